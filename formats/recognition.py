"""How a target checks a file that it may have written: from the header alone. Torch-free.

A recognized layer becomes a form, the form's promise is compared with the header, and every
difference is a line that names the tensor, what was found and what is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dqconvert.formats.form import PackedForm
from dqconvert.quantizers.schemes import schemes
from dqconvert.quantizers.spec import QuantSpec, Scheme, TensorInfo

Infos = Mapping[str, TensorInfo]


def layers_with(infos: Infos, suffix: str) -> list[str]:
    """Names of the layers that have a tensor of that suffix, in the order of the header."""
    ending = f".{suffix}"
    return [name.removesuffix(ending) for name in infos if name.endswith(ending)]


def scheme_named(target: str, specs: Collection[QuantSpec]) -> str | None:
    """The scheme of that target whose weights all have this spec; None if they are mixed."""
    if len(set(specs)) != 1:
        return None
    (spec,) = set(specs)
    fits = (s.name for s in schemes().values() if target in s.targets and s.weight == spec)
    return next(fits, None)


def scheme_for(target: str, forms: Collection[PackedForm]) -> str | None:
    """The scheme of that target under which all these layers were written, None if there is none.

    Where several write the same bytes (GPTQ and AWQ), the first by name.
    """
    names = [name for name, scheme in schemes().items() if target in scheme.targets]
    names = [name for name in names if not schemes()[name].menu]
    mixed = [name for name in names if schemes()[name].better or schemes()[name].mixes]
    plain = [name for name in names if name not in mixed]
    found = (name for name in (*plain, *mixed) if forms and fits(target, name, forms))
    return next(found, None)


def fits(target: str, name: str, forms: Iterable[PackedForm]) -> bool:
    """Whether all these layers can be of that scheme."""
    from dqconvert.formats.targets import target as target_of

    runtime, scheme = target_of(target), schemes()[name]
    others = [*([scheme.better] if scheme.better else []), *(m.scheme for m in scheme.mixes)]
    allowed = [scheme, *(schemes()[other] for other in (*others, *scheme.menu))]
    if any(runtime.accepts(one) for one in allowed):
        return False
    adapted = [
        (layout, runtime.adapt(one, layout)) for one in allowed for layout in runtime.layouts(one)
    ]
    return all(
        any(layout == form.layout and _is_of(form, one) for layout, one in adapted)
        for form in forms
    )


def _is_of(form: PackedForm, scheme: Scheme) -> bool:
    """Whether a layer's codes and rotation are those of a scheme, whatever its group size."""
    if form.spec == scheme.modulation and form.splits:
        return True
    if bool(form.rotation) != bool(scheme.rotation):
        return False
    weight, spec = scheme.weight, form.spec
    if weight == spec:
        return True
    grouped = scheme.activation is None and weight.code == "int4"
    code = "uint4" if spec.zero_point else "int4"
    return grouped and (spec.code, spec.tile[0]) == (code, 1) and spec.scale == weight.scale


def differences(
    layer: str, promised: Infos, infos: Infos, optional: Collection[str] = ()
) -> list[str]:
    """What the header lacks or has otherwise than promised, a line for each tensor."""
    lines = []
    for suffix, need in promised.items():
        name = f"{layer}.{suffix}"
        found = infos.get(name)
        if found is None:
            if suffix not in optional:
                lines.append(f"{name}: missing; needed {describe(need)}")
        elif found != need:
            lines.append(f"{name}: found {describe(found)}, needed {describe(need)}")
    return lines


def describe(info: TensorInfo) -> str:
    """Dtype and shape, for a message."""
    return f"{info.dtype} {list(info.shape)}"


def disagreements(what: str, said: Any, found: Iterable[Any]) -> list[str]:
    """A line if the file says one value of itself and its tensors say others."""
    others = sorted({value for value in found if value != said}, key=str)
    if not others:
        return []
    return [f"{what}: the file says {said}, its tensors say {', '.join(map(str, others))}"]


def contradictions(where: str, found: Any, needed: Any) -> list[str]:
    """What of some JSON is not as needed, a line for each entry of its objects."""
    if not (isinstance(found, Mapping) and isinstance(needed, Mapping)):
        return (
            [] if found == needed else [f"{where}: is {_short(found)}, should be {_short(needed)}"]
        )
    lines = []
    for key in dict.fromkeys([*needed, *found]):
        name = f"{where}.{key}"
        if key not in found:
            lines.append(f"{name}: missing; should be {_short(needed[key])}")
        elif key not in needed:
            lines.append(f"{name}: unexpected")
        else:
            lines += contradictions(name, found[key], needed[key])
    return lines


def parsed(text: Any) -> Any:
    """A metadata entry as the JSON that it is; the entry itself where it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def json_object(text: str | None) -> dict[str, Any] | None:
    """The JSON object in a metadata entry; None if there is none."""
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
