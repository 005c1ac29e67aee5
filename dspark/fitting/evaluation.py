"""What a fit says at its end: figures by domain, what limits them, and how to serve the drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspark.fitting.race import Lap, speedup
from dspark.scheduling.cost import CostTable

TEMPERATURES = (0.0, 1.0)
OVERALL = "all"


@dataclass(frozen=True)
class Limits:
    """What a round's parts cost in speed, whole blocks verified, one request.

    Attributes:
        speedup: by the cost table and the accepted length.
        all_kept: were every draft kept.
        free_drafting: were drafting free.
        free_verification: did verifying a block cost what decoding a token costs.
    """

    speedup: float
    all_kept: float
    free_drafting: float
    free_verification: float

    @classmethod
    def of(cls, costs: CostTable, accepted_length: float, drafts: int) -> Limits:
        """From what a step costs and what it gains."""
        plain, draft = costs.off_ms(1), costs.draft_ms(1)
        verify = costs.verify_ms(min(drafts + 1, costs.most_tokens(1)), 1)
        return cls(
            speedup=accepted_length * plain / (verify + draft),
            all_kept=(drafts + 1) * plain / (verify + draft),
            free_drafting=accepted_length * plain / verify,
            free_verification=accepted_length * plain / (plain + draft),
        )

    @property
    def name(self) -> str:
        """The part without whose cost decoding would gain most."""
        gains = {
            "acceptance": self.all_kept,
            "drafting cost": self.free_drafting,
            "verification cost": self.free_verification,
        }
        return max(gains, key=lambda name: gains[name])

    def sentence(self, temperature: float) -> str:
        """In plain words."""
        return (
            f"At temperature {temperature:g} the limit is {self.name}: whole blocks give "
            f"{self.speedup:.2f}x by the cost table; {self.all_kept:.2f}x if every draft were "
            f"kept, {self.free_drafting:.2f}x if drafting were free, {self.free_verification:.2f}x "
            "if verifying a block cost as little as decoding a token."
        )


def domain_rows(reports: Mapping[str, Mapping[str, Any]], laps: Sequence[Lap]) -> dict[str, Any]:
    """Accepted length and speed-up by domain and temperature, with 95 % intervals.

    Args:
        reports: of the evaluations, by "t0" and "t1".
        laps: of the races.
    """
    found: dict[str, Any] = {}
    for key, temperature in zip(("t0", "t1"), TEMPERATURES, strict=True):
        mine = [lap for lap in laps if lap.temperature == temperature]
        for name, figures in reports[key]["tasks"].items():
            raced = speedup([lap for lap in mine if lap.domain == name])
            found.setdefault(name, {})[key] = _row(figures, raced)
        found.setdefault(OVERALL, {})[key] = _row(reports[key]["macro"], speedup(mine))
    return found


def _row(figures: Mapping[str, Any], raced: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accepted_length": figures["accepted_length"],
        "accepted_length_ci95": figures["ci95"],
        "speedup": raced["speedup"],
        "speedup_ci95": raced["ci95"],
        "raced": raced["prompts"],
    }


def calibration_error(reports: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean expected calibration error over domains and both temperatures."""
    errors = [
        task["ece"]
        for report in reports.values()
        for task in report["tasks"].values()
        if task["ece"] is not None
    ]
    return sum(errors) / len(errors) if errors else None


def serving_commands(target: str, folder: str, drafts: int, *, attached: bool) -> dict[str, str]:
    """The commands that serve the drafter, by engine."""
    name = "TARGET.gguf" if not target.endswith(".gguf") else target
    convert = f"dspark convert {folder} {folder}"
    here = f"dspark serve {target}" + ("" if attached else f" --draft {folder}")
    vllm = (
        f'vllm serve {target} --speculative-config \'{{"method": "dspark", '
        f'"model": "{folder}/vllm", "num_speculative_tokens": {drafts}}}\''
    )
    sglang = (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DSPARK "
        f"--speculative-draft-model-path {folder}/sglang"
    )
    llama = (
        f"llama-server -m {name} -md {folder}/drafter.gguf --spec-type draft-dspark "
        f"--spec-draft-n-max {drafts}"
    )
    return {
        "dspark": here,
        "vLLM": f"{convert}/vllm --to speculators --target {target} && {vllm}",
        "SGLang": f"{convert}/sglang --to sglang --target {target} && {sglang}",
        "llama.cpp": f"{convert}/drafter.gguf --to gguf --target {target} && {llama}",
    }


def limits_of(
    costs: CostTable, reports: Mapping[str, Mapping[str, Any]], drafts: int
) -> dict[str, Any]:
    """What limits the speed at each temperature."""
    found: dict[str, Any] = {}
    for key, temperature in zip(("t0", "t1"), TEMPERATURES, strict=True):
        length = reports[key]["macro"]["accepted_length"]
        if length is not None:
            limits = Limits.of(costs, length, drafts)
            found[key] = asdict(limits) | {
                "limit": limits.name,
                "sentence": limits.sentence(temperature),
            }
    return found
