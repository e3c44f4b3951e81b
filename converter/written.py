"""How a quantized file was written: its scheme and options, by its manifest and its layers."""

from __future__ import annotations

from collections import Counter

from dqconvert.converter.options import KEEP, PlanOptions, is_grouped
from dqconvert.converter.reopen import Reopened
from dqconvert.formats import recognition
from dqconvert.quantizers.schemes import scheme, schemes


def scheme_of(found: Reopened) -> str | None:
    """The scheme that the manifest names if the layers can be of it, else what they look like: of
    several, that of most layers; None where some are of none.
    """
    said = found.manifest.scheme
    target, forms = found.target.NAME, found.recognized.forms.values()
    if said in schemes() and recognition.fits(target, str(said), forms):
        return said
    if found.recognized.scheme is not None:
        return found.recognized.scheme
    if said in schemes():
        return said
    each = Counter(recognition.scheme_for(target, [form]) for form in forms)
    return None if None in each or not each else each.most_common(1)[0][0]


def options_of(found: Reopened, name: str) -> PlanOptions:
    """The options that a file of that scheme was written with, as its manifest and layers say."""
    forms = list(found.recognized.forms.values())
    target, main = found.target.NAME, scheme(name)
    choices: dict[str, str] = {}
    for layer in found.layers:
        own = found.manifest.schemes.get(layer.name) or name
        mixed = main.better or main.mixes or main.menu
        if mixed or not recognition.fits(target, own, [layer.form]):
            own = recognition.scheme_for(target, [layer.form]) or own
        if own != name:
            choices |= dict.fromkeys(layer.modules, own)
    for module in found.unpacked():  # kept, or 16 bit among blocks
        theirs, _ = found.kept[f"{module}.weight"]
        own = found.manifest.schemes.get(theirs.removesuffix(".weight"), "")
        if own or found.manifest.scheme is None:
            choices[module] = own or KEEP
    grouped = [form for form in forms if is_grouped(main) and form.spec.tile[0] == 1]
    group = grouped[0].spec.tile[1] if grouped else None
    return PlanOptions(
        rank=found.recognized.rank or None,
        keep=found.manifest.keep,
        calibrated=main.calibrated or any(form.input_scale for form in forms),
        layout=forms[0].layout if forms else None,
        group_size=None if group == main.weight.tile[1] else group,
        zero_points=any(form.spec.zero_point for form in forms),
        choices=choices,
        settings=found.manifest.settings,
    )
