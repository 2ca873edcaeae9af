"""The application: crop facts, a farmer's case, the dialogues made of both, and the adviser that serves them."""
