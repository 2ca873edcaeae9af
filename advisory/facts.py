"""Everything that the adviser's rules rest on: crops, soil limits, weather rules, the status of pesticides."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from advisory.knowledge import KNOWLEDGE_DIR, Knowledge, load_knowledge
from advisory.pesticides import PesticideList
from advisory.soil import SoilLimits
from advisory.weather import WeatherRules


@dataclass(frozen=True, eq=False)
class Facts:
    """The facts of one folder; compared by identity, so that results of rules can be cached beside it."""

    knowledge: Knowledge
    soil: SoilLimits
    weather: WeatherRules
    pesticides: PesticideList

    def only(self, crop_ids: Collection[str]) -> Facts:
        """The part about some crops; see `Knowledge.only`."""
        return replace(self, knowledge=self.knowledge.only(crop_ids))


def load_facts(directory: Path = KNOWLEDGE_DIR) -> Facts:
    """Read the crop files and the rule files beside them.

    Raises:
        UserError: a file that is missing or breaks its schema.
    """
    return Facts(
        knowledge=load_knowledge(directory),
        soil=SoilLimits.load(directory),
        weather=WeatherRules.load(directory),
        pesticides=PesticideList.load(directory),
    )
