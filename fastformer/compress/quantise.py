"""Quantisation: training that knows the rounding, and weights stored as true integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastformer.compress.calibrate import plain
from fastformer.compress.method import Calibration, Method
from fastformer.compress.numerics import FORMATS, Format
from fastformer.compress.quantised import Quantised
from fastformer.compress.rounding import ROUNDINGS
from fastformer.compress.sites import Site, matching, sites
from fastformer.core.errors import FieldError, lookup, require


@dataclass(frozen=True)
class Quantise(Method):
    """Round the matrices of linear maps, and what they are multiplied with, to few bits.

    Norms, biases, decays and every other parameter that is no matrix of a linear map stay float.

    Attributes:
      format: a row of FORMATS, of the matrices that no rule names; gates, what computes in float32 whatever
        the dtype, embedding and head are float unless a rule names them.
      rules: ``"REGEX=FORMAT"`` each, the regular expression over whole parameter paths; the first that
        matches counts.
      group: inputs that share a scale in formats that leave inputs float; 0 is one scale an output.
      start: updates in float before the rounding begins; at all steps of the run, it is at the end alone.
      rounding: a row of ROUNDINGS, of what is stored in the end.

    Raises:
      FieldError: an unknown format, or a rule that cannot be read.
    """

    format: str
    rules: tuple[str, ...]
    group: int
    start: int
    rounding: str

    def __post_init__(self) -> None:
        lookup(FORMATS, self.format, "format")
        lookup(ROUNDINGS, self.rounding, "rounding")
        for field in ("group", "start"):
            require(0 <= getattr(self, field) < 2**31, field, getattr(self, field), "0 or more, below 2^31")
        for index, rule in enumerate(self.rules):
            field, (_, found, form) = f"rules[{index}]", rule.rpartition("=")
            require(bool(found), field, rule, "REGEX=FORMAT, as in '.*/mlp/.*=int4'")
            lookup(FORMATS, form, field)

    def on_model(self, model: Any) -> Quantised:
        """Return the model with its linear maps rounded.

        Raises:
          FieldError: a rule matches nothing, a group does not divide, or nothing is quantised.
          UserError: what is calibrated on text has scanned layers.
        """
        found = sites(model)
        if self.rounding != "nearest":
            plain(model)
        forms = tuple((found[path], form) for path, form in self.forms(found).items())
        return Quantised(model, forms, self.start)

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights with those that are quantised as ``QArray``: integers and their scales."""
        return ROUNDINGS[self.rounding](model, params, calibration)

    def forms(self, found: Mapping[str, Site]) -> dict[str, Format]:
        """Return the format of every matrix that is quantised, by its path."""
        left, forms = dict(found), {}
        for index, rule in enumerate(self.rules):
            pattern, _, name = rule.rpartition("=")
            for path in matching(pattern, f"rules[{index}]", list(left)):
                forms[path] = FORMATS[name]
                del left[path]
        for path, site in left.items():
            forms[path] = None if site.kept else FORMATS[self.format]
        chosen = {path: self._grouped(found[path], form) for path, form in forms.items() if form}
        if not chosen:
            raise FieldError("format", f"{self.format!r} and the rules leave every matrix float")
        return {path: chosen[path] for path in found if path in chosen}

    def _grouped(self, site: Site, form: Format) -> Format:
        if not self.group or form.inputs:
            return form
        inputs = site.shape[site.inputs[-1]]
        if inputs % self.group:
            of = "inputs of a head" if len(site.inputs) > 1 else "inputs"
            raise FieldError("group", f"{self.group} does not divide the {inputs} {of} of {site.path}")
        return dataclasses.replace(form, group=self.group)
