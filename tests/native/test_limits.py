"""The limits and codes of hivtp_kernels/types.py are those of csrc/include/hivtp/api.h."""

import pytest

from hivtp_kernels import _extension, types


def limits_of(C):
    limits = {name: getattr(C, name) for name in dir(types) if name.startswith("MAX_")}
    return limits | {name: getattr(C, name) for name in ("DTYPES", "ROWS", "STAGES")}


EXPECTED = {
    **{name: value for name, value in vars(types).items() if name.startswith("MAX_")},
    "DTYPES": {str(dtype).removeprefix("torch."): code for dtype, code in types.DTYPES.items()},
    "ROWS": types.ROWS,
    "STAGES": {name: getattr(types, name) for name in ("PADDING", "GLOBAL", "LOCAL", "FILLED")},
}


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_limits_of_the_extension(backend):
    assert limits_of(_extension.extension()) == EXPECTED


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_limits_of_the_emulator(backend, emulator):
    assert limits_of(emulator) == EXPECTED


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_structs_and_ops_take_keywords_only(backend):
    C = _extension.extension()
    selection = dict(indices=64, counts=64, stage=64)
    features = dict(data=64, image_stride=0, row_stride=0, row_bytes=0)
    features |= dict(batch=0, patches=0, prefix=0)
    op = dict(features=C.Features(**features), indices=0, capacity=0, out=0, threads=1)
    for function, arguments in (
        (C.Selection, selection),
        (C.Features, features),
        (C.gather_tokens, op),
    ):
        function(**arguments)
        with pytest.raises(TypeError, match="incompatible (constructor|function) arguments"):
            function(*arguments.values())
