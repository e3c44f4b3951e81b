"""Assembly of SVDQuant layers: a logical result to packed tensors and back.

Names and variants come from a Layout (formats/svdq.py), bytes from formats/bits.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dqconvert.formats import bits
from dqconvert.formats.form import PackedForm
from dqconvert.formats.svdq import BOTH, CHANNEL, Layout, is_nvfp4, is_w4a16
from dqconvert.quantizers.errors import SourceError
from dqconvert.quantizers.tensors import LowRank, QuantizedTensor


def pack(layout: Layout, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """Exactly the tensors that promise names."""
    kind = pack_w4a16 if is_w4a16(form) else pack_w4a4
    return kind(layout, form, q)


def unpack(layout: Layout, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The logical result: pack's argument again, up to the rounding of a bias that had 1 added.

    A smoothing vector that pack was not given comes back as ones.
    """
    kind = unpack_w4a16 if is_w4a16(form) else unpack_w4a4
    return kind(layout, form, tensors)


def pack_w4a4(layout: Layout, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """4-bit weights and activations; y = Q(x / smooth) Wᵀ + bias + (x down) up."""
    if q.lowrank is None:
        raise ValueError("a W4A4 layer has a low-rank branch")
    k = form.shape[1]
    smooth = q.codes.new_ones(k, dtype=torch.bfloat16) if q.smooth is None else _half(q.smooth)
    smooth = bits.pack_vector(smooth)
    tensors = {"qweight": bits.pack_codes(q.codes)} | _pack_scales(layout, form, q)
    # one tensor for each name: a writer may not be handed two names for one memory
    tensors |= {name: smooth.clone() for name in layout.smooth}
    tensors[layout.down] = bits.pack_down(_half(q.lowrank.down))
    tensors[layout.up] = bits.pack_up(_half(q.lowrank.up))
    return tensors | {name: bits.pack_vector(bias) for name, bias in _bias(layout, form, q).items()}


def unpack_w4a4(layout: Layout, form: PackedForm, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The inverse of pack_w4a4; SourceError where copies of the smoothing vector differ."""
    smooth = tensors[layout.smooth[0]]
    for name in layout.smooth[1:]:
        if name in tensors and not torch.equal(tensors[name], smooth):
            raise SourceError(f"{name}: found other values than in {layout.smooth[0]}")
    nvfp4 = is_nvfp4(form.spec)
    unpack_scales = bits.unpack_micro_scales if nvfp4 else bits.unpack_group_scales
    bias = tensors.get("bias")
    return QuantizedTensor(
        spec=form.spec,
        codes=bits.unpack_codes(tensors["qweight"], torch.uint8 if nvfp4 else torch.int8),
        scale=unpack_scales(tensors["wscales"]),
        tensor_scale=_tensor_scale(layout, form, tensors) if nvfp4 else None,
        bias=_if_any(form, None if bias is None else bits.unpack_vector(bias)),
        smooth=bits.unpack_vector(smooth),
        lowrank=LowRank(
            down=bits.unpack_down(tensors[layout.down]), up=bits.unpack_up(tensors[layout.up])
        ),
        shift=form.shift,
    )


def pack_w4a16(layout: Layout, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    """4-bit weights, 16-bit activations; symmetric codes are stored with a zero point."""
    codes, scale, bias = q.codes, _half(q.scale), _bias(layout, form, q)
    if layout.modulation and form.splits:
        codes = bits.interleave_chunks(codes, form.splits)
        scale = bits.interleave_chunks(scale, form.splits)
        with_ones = bits.add_ones(_given_bias(form, q), form.splits)
        bias = {"bias": bits.interleave_chunks(with_ones, form.splits)}
    wscales = scale.t().contiguous()
    return {
        "qweight": bits.pack_awq_codes(codes),
        "wscales": wscales,
        "wzeros": bits.awq_zeros(wscales),
    } | bias


def unpack_w4a16(
    layout: Layout, form: PackedForm, tensors: Mapping[str, Tensor]
) -> QuantizedTensor:
    """The inverse of pack_w4a16; SourceError on zero points other than -7 scales.

    Zero points may be off by a unit in the last place: some exporters round 7 · scale from
    fp32, not from the scale that they store.
    """
    codes = bits.unpack_awq_codes(tensors["qweight"])
    wscales, wzeros, bias = tensors["wscales"], tensors["wzeros"], tensors.get("bias")
    slack = 2 * torch.finfo(wscales.dtype).eps
    if not torch.allclose(wzeros.float(), bits.awq_zeros(wscales).float(), rtol=slack, atol=0.0):
        raise SourceError("wzeros: found asymmetric zero points; needed -7 wscales")
    scale = wscales.t().contiguous()
    if layout.modulation and form.splits:
        codes = bits.separate_chunks(codes, form.splits)
        scale = bits.separate_chunks(scale, form.splits)
        if bias is not None:
            separate = bits.separate_chunks(bias, form.splits)
            bias = bits.remove_ones(separate, form.splits)
    return QuantizedTensor(
        spec=form.spec, codes=codes, scale=scale, bias=_if_any(form, bias), shift=form.shift
    )


def _half(value: Tensor) -> Tensor:
    return value.to(torch.bfloat16)


def _given_bias(form: PackedForm, q: QuantizedTensor) -> Tensor:
    return q.codes.new_zeros(form.shape[0], dtype=torch.bfloat16) if q.bias is None else q.bias


def _bias(layout: Layout, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    if not form.bias and not layout.bias:
        if q.bias is not None:
            raise ValueError("the form promises no bias, but the result has one")
        return {}
    return {"bias": _half(_given_bias(form, q)).contiguous()}


def _if_any(form: PackedForm, bias: Tensor | None) -> Tensor | None:
    """No bias where the layer has none and the file holds zeros because it must hold some."""
    if bias is None or (not form.bias and not bool(bias.any())):
        return None
    return bias


def _pack_scales(layout: Layout, form: PackedForm, q: QuantizedTensor) -> dict[str, Tensor]:
    if not is_nvfp4(form.spec):
        return {"wscales": bits.pack_group_scales(_half(q.scale))}
    if q.tensor_scale is None:
        raise ValueError("an NVFP4 layer has a tensor scale")
    tensor_scale = _half(q.tensor_scale)
    single = tensor_scale.numel() == 1
    tensors = {"wscales": bits.pack_micro_scales(q.scale.to(torch.float8_e4m3fn))}
    if layout.scales == BOTH:
        ones = torch.ones_like(tensor_scale[:1])
        tensors["wtscale"] = tensor_scale.clone() if single else ones
        channels = ones if single else tensor_scale
    elif form.parts == 1 and layout.scales != CHANNEL:
        if not single and not torch.equal(tensor_scale, tensor_scale[:1].expand_as(tensor_scale)):
            raise ValueError("a layer of one part has one tensor scale")
        return tensors | {"wtscale": tensor_scale[:1].clone()}
    else:
        channels = tensor_scale
    tensors["wcscales"] = bits.pack_vector(channels.expand(form.shape[0]))
    return tensors


def _tensor_scale(layout: Layout, form: PackedForm, tensors: Mapping[str, Tensor]) -> Tensor:
    """[1] where one scale serves all channels, [N] otherwise. Loaders take a missing one as 1."""
    tensor, channels = tensors.get("wtscale"), tensors.get("wcscales")
    if tensor is None:
        tensor = tensors["wscales"].new_ones(1, dtype=torch.bfloat16)
    if channels is None or (form.parts == 1 and bool((channels == 1).all())):
        return tensor.reshape(1)
    channels = bits.unpack_vector(channels)
    if layout.scales == CHANNEL and form.parts == 1 and bool((channels == channels[0]).all()):
        return channels[:1]
    if bool((tensor == 1).all()):
        return channels
    return channels.float() * tensor.float()  # exact: two bf16 mantissas fit in fp32
