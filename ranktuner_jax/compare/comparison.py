"""A comparison: which runs it needs, which of them are missing, and its folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ranktuner_jax import files
from ranktuner_jax.compare.analysis import Analysis, analyse
from ranktuner_jax.compare.measure import Measurements, read_outcome
from ranktuner_jax.compare.outcome import Outcome
from ranktuner_jax.compare.search import best_rates, widened
from ranktuner_jax.compare.variants import Variant
from ranktuner_jax.errors import UserError
from ranktuner_jax.evals.benchmarks import digest
from ranktuner_jax.train import Hook, to_dict
from ranktuner_jax.train.config.show import differences

__all__ = ["RESULTS", "SEARCH_SEEDS", "Comparison", "Planned"]

RESULTS, SETTINGS = "results.json", "settings.json"

SEARCH_SEEDS = 1000
"""The first seed of the runs that choose a learning rate, which never count in the result."""

_MOST_WIDENINGS = 3


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that a comparison needs."""

    variant: Variant
    rate: float
    seed: int
    role: Literal["search", "main"]

    @property
    def name(self) -> str:
        """Its folder, below that of all runs.

        Example:
          >>> from ranktuner_jax.train import TrainConfig
          >>> Planned(Variant("sft", "tokens", TrainConfig()), 3e-4, 1001, "search").name
          'sft/0.0003/search-1'
        """
        number = self.seed - SEARCH_SEEDS if self.role == "search" else self.seed
        word = "search" if self.role == "search" else "seed"
        return f"{self.variant.name}/{self.rate:g}/{word}-{number}"


class Comparison:
    """The runs of several methods over several seeds, in one folder.

    Each run is a folder of its own, as `ranktuner train` leaves it, without checkpoints and model
    once it is measured. A comparison that was interrupted goes on at the run it was in; seeds,
    methods and learning rates may be added later.

    Args:
      folder: The folder.
      variants: The methods.
      primary: The score that decides, see `Measurements.primary`.
      rates: The learning rates to search; with a single one there is no search.
      seeds: How many runs of each method count.
      search_seeds: How many runs of each method and learning rate choose the rate.
      measurements: What is measured after each run.
      part: (k, n): does every n-th run, beginning with the k-th from 0; part 0 measures the model
        before training as well.
      started: Called before each run with it, its number from 1 and how many are planned so far;
        returns hooks for it.

    Raises:
      UserError: If the folder holds another comparison.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        variants: Sequence[Variant],
        *,
        primary: str,
        rates: Sequence[float],
        seeds: int,
        search_seeds: int,
        measurements: Measurements,
        part: tuple[int, int] = (0, 1),
        started: Callable[[Planned, int, int], Sequence[Hook]] = lambda *_: (),
    ) -> None:
        self._folder, self._variants, self._rates = folder, variants, list(rates)
        self._seeds, self._search_seeds = seeds, search_seeds
        self._measurements, self._part, self._started = measurements, part, started
        self._done: dict[str, Outcome] = {}
        self.primary = primary
        self._claim()

    def run(self) -> bool:
        """Does the runs of this part that are missing.

        Returns:
          Whether this part is finished. If not, it needs runs of other parts that are missing: to
          choose learning rates, and in part 0 for the result, which it alone may write.
        """
        first = self._part[0] == 0
        if first:
            self._before()
        if not self._all(self._search_runs()):
            return False
        for _ in range(_MOST_WIDENINGS if len(self._rates) > 1 else 0):
            grid = widened(self._rates, self.best_rates())
            if grid == self._rates:
                break
            self._rates = grid
            if not self._all(self._search_runs()):
                return False
        return self._all(self._main_runs()) or not first

    def best_rates(self) -> dict[str, float]:
        """The learning rate of each method, by the variant's name; needs the search."""
        if len(self._rates) == 1:
            return {variant.name: self._rates[0] for variant in self._variants}
        return best_rates(list(self._done.values()), self._variants, self.primary)

    def missing(self) -> int:
        """How many runs that are planned so far are not finished."""
        return sum(self._outcome(planned) is None for planned in self._planned())

    def write_results(self, baseline: str = "sft") -> Analysis:
        """Analyses all runs, and writes results.json.

        Args:
          baseline: The method that the others are compared with.
        """
        outcomes = [outcome for run in self._planned() if (outcome := self._outcome(run))]
        analysis = analyse(outcomes, primary=self.primary, baseline=baseline)
        settings = self._settings() | {
            "baseline": baseline,
            "rates": self._rates,
            "search_seeds": self._search_seeds,
            "before": self._before(),
        }
        content = {
            "settings": settings,
            "outcomes": [outcome.to_json() for outcome in outcomes],
            "analysis": analysis.to_json(),
        }
        files.write_whole(self._folder / RESULTS, json.dumps(content, indent=1))
        return analysis

    def _search_runs(self) -> list[Planned]:
        if len(self._rates) == 1:
            return []
        return [
            Planned(variant, rate, SEARCH_SEEDS + seed, "search")
            for seed in range(self._search_seeds)
            for rate in self._rates
            for variant in self._variants
        ]

    def _main_runs(self) -> list[Planned]:
        best = self.best_rates()
        # By seed, so that at any time all methods have about as many runs.
        return [
            Planned(variant, best[variant.name], seed, "main")
            for seed in range(self._seeds)
            for variant in self._variants
        ]

    def _planned(self) -> list[Planned]:
        searched = self._search_runs()
        if any(self._outcome(run) is None for run in searched):
            return searched
        return [*searched, *self._main_runs()]

    def _all(self, runs: Sequence[Planned]) -> bool:
        """Does those of this part; whether all are done."""
        k, n = self._part
        for run in runs[k::n]:
            if self._outcome(run) is None:
                planned = self._planned()
                hooks = self._started(run, planned.index(run) + 1, len(planned))
                self._done[run.name] = self._measurements.run(
                    run.variant, run.rate, run.seed, run.role, self._path(run), hooks
                )
        return all(self._outcome(run) is not None for run in runs)

    def _path(self, run: Planned) -> pathlib.Path:
        return self._folder / "runs" / run.name

    def _outcome(self, run: Planned) -> Outcome | None:
        if run.name not in self._done and (found := read_outcome(self._path(run))):
            self._done[run.name] = found
        return self._done.get(run.name)

    def _before(self) -> dict[str, float]:
        """What the model scores before training."""
        return self._measurements.before(self._variants[0].config, self._folder / "before")

    def _settings(self) -> dict[str, Any]:
        """What all runs share."""
        config = to_dict(self._variants[0].config)
        for name in ("weighting", "options", "normalize"):
            del config["loss"][name]
        del config["optimizer"]["learning_rate"], config["seed"]
        measured = self._measurements
        return {
            "config": config,
            "primary": self.primary,
            "tasks": {benchmark.name: digest(questions) for benchmark, questions in measured.tasks},
            "sampling": dataclasses.asdict(measured.sampling) if measured.tasks else {},
            "retain": measured.retain,
        }

    def _claim(self) -> None:
        """Marks the folder as this comparison's.

        Raises:
          UserError: If it holds another one, or anything else, or cannot be written.
        """
        path, settings = self._folder / SETTINGS, json.loads(json.dumps(self._settings()))
        try:
            if path.exists():
                found = differences(json.loads(path.read_text()), settings)
                if found:
                    raise UserError(
                        f"--output: {self._folder} holds a comparison with other settings "
                        f"({'; '.join(found)}); choose another folder, or the same settings"
                    )
            elif self._folder.exists() and any(self._folder.iterdir()):
                raise UserError(
                    f"--output: expected a new folder or one of a comparison, got {self._folder}, "
                    "which holds something else; choose another folder"
                )
            else:
                files.write_whole(path, json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(
                f"--output: expected a folder that can be written, got {self._folder}: "
                f"{error.strerror}; choose another folder"
            ) from error
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: expected the settings of a comparison, got a broken file ({error}); "
                "choose another --output"
            ) from error
