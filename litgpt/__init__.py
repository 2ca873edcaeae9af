"""A lean tree under LitGPT's names: a checkpoint written here loads in LitGPT 0.5.13, and the other way round.

Nothing is imported here, so that a script pays only for what it uses: `from litgpt.model import GPT`, and so on.
"""
