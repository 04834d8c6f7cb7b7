"""GPTQ files, against a plain loop over bits and against files that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import code_at, random_words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant import decode
from mixtura.quant.codecs import Decoded, Header
from mixtura.quant.codecs.gptq import Gptq, GptqFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.packing import pack_codes
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

INT32 = torch.int32


def config(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return {**base, "checkpoint_format": "gptq", **changes}


def words(*values: int) -> Tensor:
    """Words given as unsigned numbers."""
    return torch.tensor(values, dtype=torch.int64).to(INT32)


def random_parts(
    settings: dict[str, Any], num_rows: int, num_columns: int, groups: Tensor | None = None
) -> dict[str, Tensor]:
    """Parts whose every bit is random, but for scales that are finite."""
    bits, size = settings["bits"], settings["group_size"]
    num_groups = 1 if size == -1 else -(-num_columns // size)
    parts = {
        "qweight": random_words(num_columns * bits // 32, num_rows),
        "qzeros": random_words(num_groups, num_rows * bits // 32),
        "scales": torch.randn(num_groups, num_rows).to(torch.float16),
    }
    return parts if groups is None else {**parts, "g_idx": groups.to(INT32)}


def plain_loop(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """W[n, k] = scales[g, n] * (code - zero), with g from g_idx or k // group_size."""
    bits, size = settings["bits"], settings["group_size"]
    num_rows = parts["qweight"].shape[1]
    num_columns = parts["qweight"].shape[0] * 32 // bits
    offset = {"gptq": 1, "gptq_v2": 0}[settings["checkpoint_format"]]
    weight = torch.empty(num_rows, num_columns)
    for n in range(num_rows):
        column = parts["qweight"][:, n].tolist()
        for k in range(num_columns):
            group = 0 if size == -1 else k // size
            if "g_idx" in parts:
                group = int(parts["g_idx"][k])
            zero = code_at(parts["qzeros"][group].tolist(), n, bits) + offset
            if settings["sym"]:
                zero = 2 ** (bits - 1)
            difference = code_at(column, k, bits) - zero
            weight[n, k] = difference * parts["scales"][group, n].float()
    return weight


def read(settings: dict[str, Any], parts: dict[str, Tensor]) -> tuple[GptqFormat, Decoded]:
    codec = Gptq.from_config(settings)
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec.format_of("layer.weight", headers)
    assert isinstance(format, GptqFormat)
    return format, format.read("layer.weight", parts)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for part in left:
        assert left[part].dtype == right[part].dtype, part
        assert torch.equal(left[part], right[part]), part


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x76543210, [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]),
        (0x89ABCDEF, [3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0]),
    ],
)
@pytest.mark.parametrize("sym", [True, False])
def test_the_words_of_the_format_notes(word: int, expected: list[float], sym: bool) -> None:
    parts = {
        "qweight": words(word).expand(1, 8),
        "qzeros": words(0x77777777)[None],
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    weight = decode(config(group_size=8, sym=sym), parts)
    assert weight.tolist() == [expected] * 8


def test_three_bit_codes_cross_words() -> None:
    # Codes 10 and 21 of 32 lie in two words each: -4..3 over and over, as stored 0..7.
    stream = [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert [code_at(stream, index, 3) for index in range(32)] == list(range(8)) * 4
    parts = {
        "qweight": words(*stream)[:, None].expand(3, 32),
        "qzeros": random_words(1, 3),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }
    weight = decode(config(bits=3), parts)
    assert weight[5].tolist() == list(range(-4, 4)) * 4


@pytest.mark.filterwarnings("ignore:qzeros")
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [8, -1])
def test_random_bits_against_a_plain_loop(version: str, sym: bool, bits: int, size: int) -> None:
    given_config = config(bits=bits, group_size=size, sym=sym, checkpoint_format=version)
    parts = random_parts(given_config, 32, 32)
    assert torch.equal(decode(given_config, parts), plain_loop(given_config, parts))


@pytest.mark.filterwarnings("ignore:qzeros")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_files_are_written_back_bit_for_bit(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    size = data.draw(st.sampled_from([8, 32, 48, -1, 1000]))
    given_config = config(
        bits=data.draw(st.sampled_from([2, 3, 4, 8])),
        group_size=size,
        sym=data.draw(st.booleans()),
        checkpoint_format=data.draw(st.sampled_from(["gptq", "gptq_v2"])),
    )
    num_rows, num_columns = (32 * data.draw(st.integers(1, 3)) for _ in range(2))
    group = num_columns if size == -1 else size
    order = torch.arange(num_columns)
    groups = data.draw(
        st.sampled_from([None, order // group, order[torch.randperm(num_columns)] // group])
    )
    parts = random_parts(given_config, num_rows, num_columns, groups)
    parts["scales"] = parts["scales"].to(data.draw(st.sampled_from([torch.half, torch.bfloat16])))
    format, decoded = read(given_config, parts)
    assert decoded.matrix.shape == (num_rows, num_columns)
    assert_same(format.encode(decoded), parts)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_files_ignore_their_zero_points(version: str) -> None:
    given_config = config(checkpoint_format=version)
    parts = random_parts(given_config, 32, 64)
    others = {**parts, "qzeros": random_words(2, 4)}
    format, decoded = read(given_config, others)
    assert torch.equal(decode(given_config, parts), dequantize(decoded.matrix))
    assert decoded.matrix.scheme.zero_point is ZeroPoint.MID
    assert_same(format.encode(decoded), others)


@pytest.mark.parametrize("sym", [True, False])
def test_act_order_equals_a_plain_loop(sym: bool) -> None:
    given_config = config(group_size=16, sym=sym, desc_act=True, checkpoint_format="gptq_v2")
    groups = torch.randperm(72) // 16  # the last group is shorter
    given = random_parts(given_config, 32, 72, groups)
    _, decoded = read(given_config, given)
    assert decoded.matrix.scheme.has_permutation
    assert torch.equal(dequantize(decoded.matrix), plain_loop(given_config, given))


def test_act_order_that_orders_nothing_is_none() -> None:
    for given_config, groups in [
        (config(desc_act=True, group_size=-1), torch.zeros(64)),
        (config(desc_act=True), torch.arange(64) // 32),
    ]:
        parts = random_parts(given_config, 32, 64, groups)
        _, decoded = read(given_config, parts)
        assert not decoded.matrix.scheme.has_permutation
        assert torch.equal(decoded.kept["g_idx"], parts["g_idx"])


def test_an_all_ones_zero_point_warns() -> None:
    given_config = config(sym=False)
    parts = random_parts(given_config, 32, 32)
    parts["qzeros"] = words(0x77777777, 0x777777F7, 0x77777777, 0x77777777)[None]
    with pytest.warns(UserWarning, match=r"a stored 15.*zero point 16"):
        weight = decode(given_config, parts)
    assert torch.equal(weight, plain_loop(given_config, parts))


@pytest.mark.parametrize(
    "quiet", [{"sym": True}, {"sym": False, "checkpoint_format": "gptq_v2"}], ids=str
)
@pytest.mark.filterwarnings("error")
def test_an_all_ones_zero_point_is_plain_elsewhere(quiet: dict[str, Any]) -> None:
    parts = random_parts(config(), 32, 32)
    parts["qzeros"] = words(*[0xFFFFFFFF] * 4)[None]
    decode(config(**quiet), parts)


def test_a_row_of_one_word() -> None:
    given_config = config(group_size=-1)
    parts = random_parts(given_config, 8, 8)
    format, decoded = read(given_config, parts)
    assert torch.equal(dequantize(decoded.matrix), plain_loop(given_config, parts))
    assert_same(format.encode(decoded), parts)


def test_eight_bit_zero_points_reach_256() -> None:
    given_config = config(bits=8, sym=False)
    parts = random_parts(given_config, 32, 32)
    parts["qzeros"] = words(*[0xFFFFFFFF] * 8)[None]
    with pytest.warns(UserWarning, match="zero point 256"):
        format, decoded = read(given_config, parts)
    assert decoded.matrix.zero_points is not None
    assert decoded.matrix.zero_points.unique().tolist() == [256]
    assert_same(format.encode(decoded), parts)


def test_our_own_matrices_can_be_written() -> None:
    weight = torch.randn(32, 64)
    scheme = QuantScheme(Code.INT, 4, (1, 32), torch.float16, ZeroPoint.MID)
    for version, constant in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        given_config = config(checkpoint_format=version)
        matrix = quantize(weight, scheme)
        format = Gptq.from_config(given_config).format
        parts = format.encode(Decoded(matrix))
        assert parts["qzeros"].tolist() == words(*[constant] * 4).expand(2, 4).tolist()
        assert torch.equal(decode(given_config, parts), dequantize(matrix))


def test_zero_points_that_the_version_cannot_hold_are_refused() -> None:
    scheme = QuantScheme(Code.INT, 4, (1, 32), torch.float16, ZeroPoint.INTEGER)
    matrix = quantize(torch.rand(32, 32), scheme)  # zero points 0
    assert Gptq.from_config(config(sym=False, checkpoint_format="gptq_v2")).format.encode(
        Decoded(matrix)
    )
    with pytest.raises(ConfigError, match=r"zero_points \(0\.\.0\) must be in 1\.\.16"):
        Gptq.from_config(config(sym=False)).format.encode(Decoded(matrix))


def test_a_zero_point_beyond_the_codes_needs_version_1() -> None:
    given_config = config(sym=False)
    parts = {**random_parts(given_config, 32, 32), "qzeros": words(*[0xFFFFFFFF] * 4)[None]}
    with pytest.warns(UserWarning, match="zero point 16"):
        _, decoded = read(given_config, parts)
    with pytest.raises(ConfigError, match=r"zero_points \(16\.\.16\) must be in 0\.\.15"):
        Gptq.from_config(config(sym=False, checkpoint_format="gptq_v2")).format.encode(decoded)


def test_matrices_of_another_scheme_are_not_written() -> None:
    scheme = QuantScheme(Code.INT, 4, (1, 64), torch.float16, ZeroPoint.MID)
    matrix = quantize(torch.randn(32, 128), scheme)
    with pytest.raises(ConfigError, match="must be \\(N, K\\) of scheme"):
        Gptq.from_config(config()).format.encode(Decoded(matrix))
    whole = quantize(torch.randn(32, 64), scheme)  # a group as long as the row is the whole row
    assert Gptq.from_config(config(group_size=-1)).format.encode(Decoded(whole))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing qzeros": ({"qzeros": None}, "must have a part qzeros"),
    "missing scales": ({"scales": None}, "must have a part scales"),
    "missing qweight": ({"qweight": None}, r"qweight \(none\)"),
    "flat qweight": ({"qweight": random_words(8)}, r"qweight \(shape \(8,\)\)"),
    "dense beside": ({"weight": torch.ones(32, 64)}, "got weight besides"),
    "dtype of codes": ({"qweight": torch.zeros(8, 32)}, r"qweight .*must be .*int32"),
    "dtype of scales": ({"scales": torch.zeros(2, 32, dtype=INT32)}, "scales .*must be"),
    "rows of scales": ({"scales": torch.zeros(2, 31).half()}, r"scales .*\(2, 32\)"),
    "groups of scales": ({"scales": torch.zeros(4, 32).half()}, r"scales .*\(2, 32\)"),
    "transposed scales": ({"scales": torch.zeros(32, 2).half()}, r"scales .*\(2, 32\)"),
    "width of zero points": ({"qzeros": random_words(2, 32)}, r"qzeros .*\(2, 4\)"),
    "length of g_idx": ({"g_idx": torch.zeros(63, dtype=INT32)}, r"g_idx .*\(64,\)"),
    "dtype of g_idx": ({"g_idx": torch.zeros(64)}, "g_idx .*int32"),
    "no rows": ({"qweight": random_words(8, 0)}, "positive sizes"),
    "odd rows": ({"qweight": random_words(8, 33)}, r"output features \(33\)"),
    "NaN scale": ({"scales": torch.full((2, 32), torch.nan).half()}, r"scales \(at \(0, 0\)\)"),
    "infinite scale": ({"scales": torch.full((2, 32), torch.inf).half()}, "scales .*got inf"),
    "negative group": ({"g_idx": torch.full((64,), -1, dtype=INT32)}, r"g_idx \(-1\.\.-1\)"),
    "group beyond": ({"g_idx": torch.full((64,), 2, dtype=INT32)}, r"g_idx \(2\.\.2\)"),
    "uneven groups": ({"g_idx": torch.zeros(64, dtype=INT32)}, r"g_idx .*every group 32 columns"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_parts_are_refused(fault: str) -> None:
    changes, message = FAULTS[fault]
    parts: dict[str, Tensor | None] = {**random_parts(config(), 32, 64), **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        decode(config(), {part: tensor for part, tensor in parts.items() if tensor is not None})
    assert "projection.weight" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"bits": 2}, {"group_size": 64}, {"group_size": -1}], ids=str
)
def test_a_configuration_that_contradicts_the_headers_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="both of one model"):
        decode(config(**changes), random_parts(config(), 32, 64))


def test_three_bits_need_whole_words() -> None:
    parts = random_parts(config(bits=3), 32, 32)
    with pytest.raises(CheckpointError, match=r"qweight \(2 words\)"):
        decode(config(bits=3), {**parts, "qweight": random_words(2, 32)})


def test_the_shape_of_the_model_must_be_that_of_the_file() -> None:
    parts = random_parts(config(), 32, 64)
    assert decode(config(), parts, shape=(32, 64)).shape == (32, 64)
    with pytest.raises(CheckpointError, match=r"got \(64, 32\)"):
        decode(config(), parts, shape=(64, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"bits \(5\) must be one of 2, 3, 4, 8"),
        ({"bits": None}, "bits .*got none"),
        ({"bits": 4.0}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": None}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"sym": "yes"}, "sym"),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format .*bitblas.*gptq, gptq_v2"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"checkpoint_format": None, "format": "gptq_p"}, "checkpoint_format .*gptq_p"),
        ({"dynamic": ["x"]}, "dynamic"),
        ({"dynamic": {"+:(": {}}}, "dynamic .*regular expression"),
        ({"dynamic": {"+:x": 4}}, "dynamic .*settings"),
        ({"dynamic": {"+:x": {"bits": 6}}}, "bits"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Gptq.from_config(config(**changes))


def test_settings_of_single_modules() -> None:
    rules = {
        r"-:.*mlp\.gate$": {},
        r"+:.*layers\.0\..*": {"bits": 8, "group_size": 64, "sym": False},
        r".*layers\.1\..*": {"group_size": -1},
        r"-:model\.layers\.5": {},
    }
    codec = Gptq.from_config(config(dynamic=rules))
    headers = {"qweight": Header(INT32, (1, 1))}

    def found(name: str) -> GptqFormat:
        format = codec.format_of(name, headers)
        assert isinstance(format, GptqFormat)
        return format

    assert found("model.layers.0.mlp.up_proj.weight") == GptqFormat(8, 64, False, 1)
    assert found("model.layers.1.mlp.up_proj.weight") == GptqFormat(4, None, True, 1)
    assert found("model.layers.2.mlp.up_proj.weight") == codec.format
    assert not codec.expects("model.layers.0.mlp.gate.weight")
    assert codec.expects("model.layers.0.mlp.gate_proj.weight")
    assert not codec.expects("model.layers.5.mlp.up_proj.weight")
    assert codec.expects("visual.model.layers.5.mlp.up_proj.weight")  # from the beginning
    assert found("model.layers.2.mlp.gate.weight") == codec.format  # tensors decide
    assert not codec.expects("lm_head.weight")
    assert Gptq.from_config(config(lm_head=True)).expects("lm_head.weight")


def test_unquantized_modules_stay_as_they_are() -> None:
    codec = Gptq.from_config(config())
    assert codec.split("layer.mlp.gate.weight") == ("layer.mlp.gate.weight", "weight")
    assert codec.split("layer.mlp.gate.bias") is None
    assert codec.format_of("gate.weight", {"weight": Header(torch.bfloat16, (4, 8))}) is None
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(decode(config(), {"weight": weight}), weight.float())
    with pytest.raises(CheckpointError, match=r"weight \(\(4, 8\)\)"):
        decode(config(), {"weight": weight}, shape=(8, 4))
    with pytest.raises(CheckpointError, match="qweight"):
        decode(config(), {"weight": torch.zeros(4, 8, dtype=torch.int8)})


def test_formats_are_values() -> None:
    assert len({Gptq.from_config(config()).format, Gptq.from_config(config()).format}) == 1


def test_codes_lie_as_in_our_own_packing() -> None:
    codes = torch.randint(0, 8, (32, 32), dtype=torch.uint8)
    stream = pack_codes(codes, 3).view(INT32)
    parts = {**random_parts(config(bits=3), 32, 32), "qweight": stream.t().contiguous()}
    _, decoded = read(config(bits=3), parts)
    assert torch.equal(decoded.matrix.values, pack_codes(codes, 3))
