"""The ceilings: machine code is read right, the model gives the numbers of a calculation by hand, a loss fails."""

import importlib.metadata
import json
from collections import Counter

import pytest

report = pytest.importorskip("fastgrpo.kernels.report")
ceilings = pytest.importorskip("fastgrpo.kernels.ceilings")

OWN = importlib.metadata.version("triton")
SQUARE = ceilings.Tile(128, 128, 64, 8)
H200 = ceilings.DEVICES["sm_90"]

# The certified forward on sm_90, cuobjdump -sass, most lines left out.
SASS = """
code for sm_90a
Function : forward_kernel
/*0000*/   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
/* 0x000e700000000800 */
/*0010*/   LDC.64 R2, c[0x0][0x238] ;   /* 0x00008e00ff027b82 */
/* 0x000ea20000000a00 */
/*1260*/   VIADD R5, R19, UR4 ;
/*2050*/   @!P0 BRA 0x1260 ;
/*2950*/   LDC R112, c[0x0][0x228] ;
/*2b70*/   LDGSTS.E.BYPASS.128 [R41], desc[UR16][R2.64], P3 ;
/*2bb0*/   LDGSTS.E.BYPASS.128 [R41+0x1000], desc[UR16][R8.64], P3 ;
/*2c00*/   LDGSTS.E.BYPASS.128 [R41+0x2000], desc[UR16][R6.64], P3 ;
/*2c40*/   LDGSTS.E.BYPASS.128 [R41+0x3000], desc[UR16][R4.64], P3 ;
/*2ca0*/   LDGDEPBAR ;
/*2e90*/   LDGSTS.E.BYPASS.128 [R41+0xc000], desc[UR16][R32.64], P3 ;
/*2ed0*/   LDGSTS.E.BYPASS.128 [R41+0xd000], desc[UR16][R34.64], P3 ;
/*2f10*/   LDGSTS.E.BYPASS.128 [R41+0xe000], desc[UR16][R36.64], P3 ;
/*2f20*/   LDGSTS.E.BYPASS.128 [R41+0xf000], desc[UR16][R38.64], P3 ;
/*2f30*/   LDGDEPBAR ;
/*2f40*/   BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*2f80*/   LDGSTS.E.BYPASS.128 [R41+0x4000], desc[UR16][R2.64+0x80], P4 ;
/*2f90*/   LDGSTS.E.BYPASS.128 [R41+0x5000], desc[UR16][R8.64+0x80], P4 ;
/*2fa0*/   LDGSTS.E.BYPASS.128 [R41+0x6000], desc[UR16][R6.64+0x80], P4 ;
/*2fb0*/   LDGSTS.E.BYPASS.128 [R41+0x7000], desc[UR16][R4.64+0x80], P4 ;
/*2fc0*/   LDGDEPBAR ;
/*2fd0*/   LDGSTS.E.BYPASS.128 [R41+0x10000], desc[UR16][R32.64+0x80], P4 ;
/*2fe0*/   LDGSTS.E.BYPASS.128 [R41+0x11000], desc[UR16][R34.64+0x80], P4 ;
/*2ff0*/   LDGSTS.E.BYPASS.128 [R41+0x12000], desc[UR16][R36.64+0x80], P4 ;
/*3000*/   LDGSTS.E.BYPASS.128 [R41+0x13000], desc[UR16][R38.64+0x80], P4 ;
/*3020*/   LDGDEPBAR ;
/*3070*/   @!P2 BRA 0x3ba0 ;
/*3560*/   DEPBAR.LE SB0, 0x2 ;
/*3570*/   BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*3650*/   IMAD.WIDE.U32 R112, R114, 0x10, R112 ;
/*36d0*/   @!PT LDS RZ, [RZ] ;
/*37a0*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
/*3850*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
/*3880*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
/*3890*/   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
/*38a0*/   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
/*38f0*/   LDGSTS.E.BYPASS.128 [R115], desc[UR16][R112.64], !P0 ;
/*3900*/   LDGSTS.E.BYPASS.128 [R115+0x1000], desc[UR16][R116.64], !P0 ;
/*3910*/   LDGSTS.E.BYPASS.128 [R115+0x2000], desc[UR16][R118.64], !P0 ;
/*3980*/   LDGSTS.E.BYPASS.128 [R115+0x3000], desc[UR16][R120.64], !P0 ;
/*39c0*/   LDGDEPBAR ;
/*3a20*/   LDGSTS.E.BYPASS.128 [R115+0xc000], desc[UR16][R122.64], !P0 ;
/*3a80*/   LDGSTS.E.BYPASS.128 [R115+0xd000], desc[UR16][R124.64], !P0 ;
/*3aa0*/   LDGSTS.E.BYPASS.128 [R115+0xe000], desc[UR16][R112.64], !P0 ;
/*3ad0*/   LDGSTS.E.BYPASS.128 [R115+0xf000], desc[UR16][R116.64], !P0 ;
/*3b50*/   LDGDEPBAR ;
/*3b80*/   IMAD.X R131, RZ, RZ, R131, P0 ;
/*3b90*/   @!P5 BRA 0x3560 ;
/*3ba0*/   ULDC.64 UR4, c[0x0][0x278] ;
/*3bb0*/   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
/*4bc0*/   SHFL.BFLY PT, R128, R117, 0x10, 0x1f ;
/*6ef0*/   FMNMX R67, R24, R27, !PT ;
/*b010*/   @!P0 BRA 0x2950 ;
/*b340*/   STG.E desc[UR16][R4.64], R19 ;
/*b350*/   EXIT ;
/*b360*/   BRA 0xb360;
/*b370*/   NOP;
/*b380*/   NOP;
..........
"""


def test_sass_is_parsed():
    found = ceilings.parse(SASS)
    assert len(found) == SASS.count(";")
    assert found[0] == (0, "LDC", " R1, c[0x0][0x28] ")
    assert [i.opcode for i in found if i.address in (0x2050, 0x36D0, 0x37A0)] == [
        "BRA", "NOP", "HGMMA.64x128x16.F32.BF16",
    ]  # fmt: skip


def test_loops_are_found():
    # neither the branch forward nor the one to itself; the label's loop has no tensor-core instruction
    assert ceilings.find_loops(ceilings.parse(SASS)) == [(0x3560, 0x3B90), (0x1260, 0x2050), (0x2950, 0xB010)]


def test_code_is_read():
    code = ceilings.read(ceilings.parse(SASS), SQUARE)
    assert code.loop.total() == 21
    assert code.loop["LDGSTS.E.BYPASS.128"] == 8
    assert code.epilogue.total() == 28
    assert code.epilogue["FMNMX"] == 1
    assert (code.products, code.ahead, code.one_tile) == (128 * 128 * 64, 2.0, False)


def test_loops_alike_are_hot_together():
    loop = SASS[SASS.index("/*3560*/") : SASS.index("/*3ba0*/")]
    again = "".join(f"/*{int(line[2:6], 16) + 0x700:04x}*/{line[8:]}\n" for line in loop.splitlines())
    again = again.replace("BRA 0x3560", "BRA 0x3c60")
    both = SASS.replace("/*4bc0*/", again + "/*4bc0*/")
    once, twice = (ceilings.read(ceilings.parse(sass), SQUARE) for sass in (SASS, both))
    assert (once.loops, twice.loops) == (1, 2)
    assert (twice.loop, twice.epilogue, twice.products) == (once.loop, once.epilogue, once.products)
    assert twice.ahead == once.ahead / 2  # its first copies are among those of both
    apart = SASS.replace("/*b370*/   NOP;", "/*b370*/   BRA 0x37a0 ;")  # back from where it waited
    assert ceilings.read(ceilings.parse(apart), SQUARE) == once
    # such a jump from the first loop's wait goes over the second: it is not what does the tiles
    apart = both.replace("/*b370*/   NOP;", "/*b370*/   BRA 0x37a0 ;")
    assert ceilings.read(ceilings.parse(apart), SQUARE) == twice


def test_a_program_of_one_tile_pays_all_outside_its_loop():
    code = ceilings.read(ceilings.parse(SASS.replace("BRA 0x2950", "BRA 0xb340")), SQUARE)
    assert code.one_tile
    assert code.epilogue.total() == 28 + 7  # not the NOPs behind the end


def test_code_without_a_tensor_core_loop_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        ceilings.read(ceilings.parse(SASS.replace("HGMMA", "FFMA")), SQUARE)


@pytest.mark.parametrize(
    ("opcode", "products"),
    [("HMMA.16816.F32.BF16", 8 * 2048), ("HGMMA.64x128x16.F32.BF16", 2 * 131072), ("UTCHMMA", 262144), ("FFMA", 0)],
)
def test_products(opcode, products):
    assert ceilings.products(opcode, SQUARE) == products


def test_pipes():
    opcodes = Counter({"FSEL": 3, "MUFU.EX2": 2, "LDS.128": 1, "SHFL.BFLY": 1, "IMAD.MOV.U32": 5, "FMUL": 7, "NOP": 1})
    expected = {"issue": 20, "alu": 6, "mufu": 16, "memory": 16 + 4, "imad": 10, "fp32": 12}
    assert ceilings.pipe_cycles(opcodes, 4, H200) == expected
    assert ceilings.pipe_cycles(opcodes, 8, ceilings.DEVICES["sm_80"]) == {
        pipe: 2 * c * (2 if pipe == "fp32" else 1) for pipe, c in expected.items()
    }


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(217, 98304, 8, 1), (128, 98304, 8, 2), (121, 1000, 8, 2), (120, 1000, 8, 2), (64, 1000, 8, 4), (32, 0, 16, 4)],
)
def test_ctas(registers, shared, warps, expected):
    assert ceilings.ctas(H200, registers, shared, warps) == expected


# 16 trips of 128 x 128 x 64 take 16 * 512 cycles of an H200's tensor cores and 16 * 200 slots of its schedulers.
CODE = ceilings.Code(Counter({"HGMMA": 4, "UMOV": 96}), Counter({"UMOV": 1000}), 128 * 128 * 64, 2.0, False)


@pytest.mark.parametrize(
    ("change", "resident", "length", "fed", "expected"),
    [
        ({}, 1, 1024, True, 8192 / (8192 + 2000 + 270)),
        ({}, 1, 1000, True, 8000 / (8192 + 2000 + 270)),  # a step is not full
        ({}, 1, 1024, False, 8192 / (16 * 32768 / 56 + 2000 + 270)),
        ({}, 2, 1024, True, 1.0),
        ({}, 2, 1024, False, 512 / (32768 / 56)),
        ({"epilogue": Counter({"FSEL": 1000})}, 1, 1024, True, 8192 / (8192 + 4000 + 270)),
        ({"epilogue": Counter({"FSEL": 3000})}, 2, 1024, True, 8192 / 12000),  # its pipe is busy all the time
        ({"loop": Counter({"UMOV": 300})}, 1, 1024, True, 8192 / (16 * 600 + 2000 + 270)),
        ({"one_tile": True}, 1, 1024, True, 8192 / (8192 + 2000 + 3 * 270)),
        ({"loops": 2}, 1, 1024, True, 8192 / (8192 + 2000 + 2 * 270)),
        ({"loops": 2, "one_tile": True}, 1, 1024, True, 8192 / (8192 + 2000 + 4 * 270)),
        ({"ahead": 0.0}, 1, 1024, True, 8192 / (8192 + 2000 + 270)),
        ({"ahead": 0.5}, 1, 1024, True, 8192 / (16 * 540 + 2000 + 270)),
        ({"products": 2 * 128 * 128 * 64}, 1, 1024, True, 8192 / (8192 + 2000 + 270)),  # two steps a trip
    ],
)
def test_ceiling(change, resident, length, fed, expected):
    found = ceilings.ceiling(CODE._replace(**change), SQUARE, H200, resident, length, fed)
    assert found == pytest.approx(expected, rel=1e-12)


ROW = {
    "architecture": "sm_90", "kernel": "forward", "triton": OWN, "tile": "128x128x64", "loop": 100, "tensor": 4,
    "copies": 8, "ahead": 2.0, "buffers": 3, "epilogue": 1400, "busiest": "issue", "registers": 217, "ctas": 1,
    "ceiling": {"896": 0.5, "1536": 0.6, "4096": 0.7}, "fed": {"896": 0.7, "1536": 0.8, "4096": 0.9},
}  # fmt: skip
COMPILED = {
    "architecture": "sm_90", "triton": OWN, "kernel": "forward_kernel", "variant": "bfloat16", "spill_bytes": 0,
    "shared": 1000, "tensor_core": 3, "registers": 200,
}  # fmt: skip


def run(monkeypatch, tmp_path, committed, found, *arguments):
    """The report's exit status, its compilations replaced by ``found``."""
    path = tmp_path / "ceilings.json"
    if not path.exists():
        path.write_text(json.dumps({"kernels": committed}))
    monkeypatch.setattr(ceilings, "COMMITTED", path)
    monkeypatch.setattr(report, "child", lambda architecture, version, only: ([COMPILED, *found], None))
    return report.main(["--architectures", "sm_90", "--triton", OWN, *arguments])


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ([ROW], 0),
        ([{**ROW, "fed": {**ROW["fed"], "1536": 0.77}}], 0),
        ([{**ROW, "fed": {**ROW["fed"], "1536": 0.75}}], 1),
        ([{**ROW, "ceiling": {**ROW["ceiling"], "4096": 0.66}}], 1),
        ([{**ROW, "ceiling": {**ROW["ceiling"], "896": 0.9}}], 0),
        ([{**ROW, "triton": "3.0.0"}], 1),
        ([ROW, {**ROW, "kernel": "masses"}], 1),
        ([], 1),
    ],
    ids=range(8),
)
def test_a_worse_ceiling_fails(monkeypatch, tmp_path, found, status):
    assert run(monkeypatch, tmp_path, [ROW], found) == status


def test_update_writes_what_then_passes(monkeypatch, tmp_path):
    worse, other = {**ROW, "fed": {**ROW["fed"], "896": 0.1}}, {**ROW, "architecture": "sm_80"}
    assert run(monkeypatch, tmp_path, [other, ROW], [worse]) == 1
    assert run(monkeypatch, tmp_path, None, [worse], "--update") == 0
    assert run(monkeypatch, tmp_path, None, [worse]) == 0
    assert ceilings.load()["kernels"] == [other, worse]  # what was not compiled stays


def test_every_hot_launch_is_looked_at():
    names = {"forward", "forward certified", "masses", "dlogits", "dhidden", "dweight"}
    names |= {"forward pair", "forward pair mixture", "dlogits pair", "dlogits pair mixture"}
    for architecture in ceilings.DEVICES:
        launches = report.recorded_launches(architecture, depths=(1536,))
        found = [ceilings.hot_launch(kernel.fn.__name__, label, arguments) for label, kernel, arguments in launches]
        assert {f[:2] for f in found if f} == {(name, 1536) for name in names}
    committed = ceilings.load()
    rows = {(r["architecture"], r["kernel"]) for r in committed["kernels"]}
    assert rows == {(a, name) for a in ceilings.DEVICES for name in names} | {("sm_90", "forward certified deep")}
    assert committed["devices"] == {a: device._asdict() for a, device in ceilings.DEVICES.items()}
