"""The emulator's own parts: that PTX means what it says, and that what a GPU would not forgive is found.

``make gpu-emulate`` runs the tests of the kernels on it.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.quick

FOLDER = str(Path(__file__).parent / "emulator")
THREADS = 64


@pytest.fixture
def emulator(monkeypatch):
    monkeypatch.setattr(sys, "path", [FOLDER, *sys.path])
    with np.errstate(all="ignore"):
        import arith
        import blackwell
        import hopper
        import machine
        import memory
        import ptx

        yield SimpleNamespace(arith=arith, blackwell=blackwell, hopper=hopper, machine=machine, memory=memory, ptx=ptx)


def run(emulator, body, *arrays, shared=1024, grid=1, threads=THREADS):
    """Run instructions, with %rd1, %rd2 ... the addresses of ``arrays`` and %r1 the thread."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(len(arrays)))
    text = (
        f".visible .entry k(\n{parameters}\n)\n.reqntid {threads}\n{{\n.reg .b32 %r<9>;\n{loads}\n"
        f"mov.u32 %r1, %tid.x;\n{body}\nret;\n}}\n"
    )
    kernel = emulator.ptx.Kernel(text)
    arguments = [np.array([x.ctypes.data], np.uint64) for x in arrays]
    for place in range(grid):
        kernel.run(emulator.machine.Program((place, 0, 0), (grid, 1, 1), threads, shared), arguments)
    return kernel


def own(rd, to, width=4):
    """The address of each thread's own number."""
    return f"mul.wide.u32 %rd9, %r1, {width};\nadd.s64 %{to}, %{rd}, %rd9;"


READ = f"""
    {own("rd1", "rd4")}
    {own("rd2", "rd5")}
    {own("rd3", "rd6")}
    ld.global.b32 {{ %r2 }}, [ %rd4 + 0 ];
    ld.global.b32 %r3, [%rd5];
"""
WRITE = "\nst.global.b32 [ %rd6 + 0 ], { %r5 };"


@pytest.mark.parametrize(
    ("instruction", "a", "b", "want"),
    [
        ("add.s32 %r5, %r2, %r3;", 0xFFFFFFFF, 2, 1),
        ("sub.s32 %r5, %r2, %r3;", 1, 2, 0xFFFFFFFF),
        ("mul.lo.s32 %r5, %r2, %r3;", 0x10001, 0x10001, 0x20001),
        ("mul.hi.u32 %r5, %r2, %r3;", 0x80000000, 6, 3),
        ("mad.lo.s32 %r5, %r2, %r3, 7;", 5, 6, 37),
        ("div.s32 %r5, %r2, %r3;", -7, 2, -3),
        ("rem.s32 %r5, %r2, %r3;", -7, 2, -1),
        ("min.s32 %r5, %r2, %r3;", -7, 2, -7),
        ("min.u32 %r5, %r2, %r3;", -7, 2, 2),
        ("max.s32 %r5, %r2, -9;", -7, 0, -7),
        ("shl.b32 %r5, %r2, %r3;", 1, 40, 0),
        ("shr.s32 %r5, %r2, %r3;", -8, 1, -4),
        ("shr.s32 %r5, %r2, %r3;", -8, 99, -1),
        ("shr.u32 %r5, %r2, %r3;", 0x80000000, 31, 1),
        ("bfe.u32 %r5, %r2, 4, 8;", 0xABCD, 0, 0xBC),
        ("bfe.s32 %r5, %r2, 4, 8;", 0xABCD, 0, -0x44),
        ("prmt.b32 %r5, %r2, %r3, 0x5410U;", 0x11223344, 0x55667788, 0x77883344),
        ("not.b32 %r5, %r2;", 0, 0, -1),
        ("setp.lt.s32 %p1, %r2, %r3;\nselp.b32 %r5, 8, 9, %p1;", -1, 1, 8),
        ("setp.lt.u32 %p1, %r2, %r3;\nselp.b32 %r5, 8, 9, %p1;", -1, 1, 9),
        ("mov.b32 {%rs1, %rs2}, %r2;\nmov.b32 %r5, {%rs2, %rs1};", 0x11223344, 0, 0x33441122),
        (
            "cvt.s8.s32 %rs1, %r2;\ncvt.s16.s8 %rs2, %rs1;\ncvt.s64.s16 %rd8, %rs2;\ncvt.u32.u64 %r5, %rd8;",
            0x1FF,
            0,
            -1,
        ),
        ("cvt.s64.s32 %rd8, %r2;\nshr.s64 %rd8, %rd8, 4;\ncvt.u32.u64 %r5, %rd8;", -32, 0, -2),
    ],
)
def test_integers(emulator, instruction, a, b, want):
    x, y, out = (np.full(THREADS, n & 0xFFFFFFFF, np.uint32) for n in (a, b, 0))
    run(emulator, f"{READ}{instruction}{WRITE}", x, y, out)
    assert (out == np.uint32(want & 0xFFFFFFFF)).all()


TINY, INF, NAN = 2.0**-130, np.inf, np.nan


@pytest.mark.parametrize(
    ("instruction", "a", "b", "want"),
    [
        ("fma.rn.f32 %r5, %r2, %r3, 0fBF800000;", 1 + 2**-12, 1 - 2**-12, -(2.0**-24)),  # one rounding
        ("add.f32 %r5, %r2, %r3;", TINY, TINY, 2 * TINY),
        ("ex2.approx.ftz.f32 %r5, %r2;", -130.0, 0, 0.0),
        ("ex2.approx.f32 %r5, %r2;", -130.0, 0, 2.0**-130),
        ("div.approx.f32 %r5, %r2, %r3;", 3.0, 2.0**127, 0.0),
        ("div.full.f32 %r5, %r2, %r3;", 6.0, 3.0, 2.0),
        ("max.f32 %r5, %r2, %r3;", NAN, 3.0, 3.0),
        ("max.NaN.f32 %r5, %r2, %r3;", NAN, 3.0, NAN),
        ("max.f32 %r5, %r2, %r3, 0f40800000;", NAN, 3.0, 4.0),
        ("max.NaN.f32 %r5, %r2, 0f40800000, %r3;", 1.0, NAN, NAN),
        ("min.f32 %r5, %r2, %r3;", -INF, NAN, -INF),
        ("neg.f32 %r5, %r2;", 0.0, 0, -0.0),
        ("setp.leu.f32 %p1, %r2, %r3;\nselp.f32 %r5, 0f3F800000, 0f00000000, %p1;", NAN, 1.0, 1.0),
        ("setp.neu.f32 %p1, %r2, %r3;\nselp.f32 %r5, 0f3F800000, 0f00000000, %p1;", NAN, 1.0, 1.0),
        ("setp.ne.f32 %p1, %r2, %r3;\nselp.f32 %r5, 0f3F800000, 0f00000000, %p1;", NAN, 1.0, 0.0),
        ("setp.num.f32 %p1, %r2, %r3;\nselp.f32 %r5, 0f3F800000, 0f00000000, %p1;", NAN, 1.0, 0.0),
        ("cvt.rn.bf16.f32 %rs1, %r2;\ncvt.f32.bf16 %r5, %rs1;", 1 + 2**-8 + 2**-20, 0, 1 + 2**-7),
        ("cvt.rn.bf16.f32 %rs1, %r2;\ncvt.f32.bf16 %r5, %rs1;", 1 + 2**-8, 0, 1.0),  # to even
        ("cvt.rn.f16x2.f32 %r4, %r2, %r3;\nmov.b32 {%rs1, %rs2}, %r4;\ncvt.f32.f16 %r5, %rs1;", 1.0, 2.5, 2.5),
        ("mov.b64 %rd8, {%r2, %r3};\nadd.f32x2 %rd8, %rd8, %rd8;\nmov.b64 {_, %r5}, %rd8;", 1.0, 2.5, 5.0),
        ("cvt.rzi.s32.f32 %r4, %r2;\ncvt.rn.f32.s32 %r5, %r4;", -2.7, 0, -2.0),
        ("abs.f32 %r5, %r2;", -2.7, 0, 2.7),
    ],
)
def test_numbers(emulator, instruction, a, b, want):
    x, y, out = (np.full(THREADS, n, np.float32) for n in (a, b, 0))
    run(emulator, f"{READ}{instruction}{WRITE}", x, y, out)
    np.testing.assert_array_equal(out, np.full(THREADS, want, np.float32))
    assert (np.signbit(out) == np.signbit(np.float32(want))).all() or np.isnan(want)


def test_approximate_instructions_may_be_a_little_wrong(emulator, monkeypatch):
    """By as much as asked for, and the same each time; of integers an exponential is exact."""
    x = np.linspace(-20, 20, 1001).astype(np.float32)
    y = np.float32(3) + x[::-1] ** 2
    exact = np.exp2(x.astype(np.float64)), x.astype(np.float64) / y
    for error in (0.0, 2.0**-22):
        monkeypatch.setattr(emulator.arith, "APPROXIMATE", error)
        found = emulator.arith.exp2(x), emulator.arith.ratio(x, y)
        for got, again, want in zip(found, (emulator.arith.exp2(x.copy()), emulator.arith.ratio(x, y.copy())), exact):
            np.testing.assert_array_equal(got, again)
            off = np.abs(got - want)[want != 0] / np.abs(want[want != 0])
            assert 0.5 * error <= off.max() <= error + 2.0**-24
        np.testing.assert_array_equal(found[0][::25], exact[0][::25])


def test_threads_part_and_meet_again(emulator):
    """A loop that each thread leaves after a number of rounds of its own, with a store under a predicate inside."""
    body = f"""
    {own("rd1", "rd4")}
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
$L__BB0_1:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra $L__BB0_2;
    add.s32 %r2, %r2, 1;
    add.s32 %r3, %r3, %r2;
    bra.uni $L__BB0_1;
$L__BB0_2:
    setp.ne.b32 %p2, %r1, 5;
    shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
    @%p2 st.global.b32 [ %rd4 + 0 ], {{ %r4 }};
    """
    out = np.zeros(THREADS, np.uint32)
    kernel = run(emulator, body, out)
    assert kernel.parted
    other = np.arange(THREADS) ^ 1
    np.testing.assert_array_equal(out, np.where(np.arange(THREADS) == 5, 0, other * (other + 1) // 2))


def test_threads_that_have_parted_wait_for_each_other(emulator):
    """The first warp writes what the second one reads behind a barrier, from a branch that comes later in the text."""
    body = f"""
    {own("rd1", "rd4")}
    setp.lt.u32 %p1, %r1, 32;
    shl.b32 %r2, %r1, 2;
    xor.b32 %r3, %r2, 128;
    @%p1 bra $L__BB0_2;
$L__BB0_1:
    bar.sync 0;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [%rd4], %r4;
    bra.uni $L__BB0_3;
$L__BB0_2:
    st.shared.b32 [%r2], %r1;
    bra.uni $L__BB0_1;
$L__BB0_3:
    """
    out = np.zeros(THREADS, np.uint32)
    run(emulator, body, out)
    assert (out[32:] == np.arange(32)).all()
    with pytest.raises(ValueError, match="threads wait for each other"):
        run(emulator, body.replace("bra.uni $L__BB0_1", "bar.sync 0"), out)


STORE, LOAD = "st.shared.b32 [%r2], %r1;", "ld.shared.b32 %r4, [%r3];"
PLACES = "shl.b32 %r2, %r1, 2;\nxor.b32 %r3, %r2, {};"  # own, and another thread's


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (f"{PLACES.format(4)}\n{STORE}\n{LOAD}", None),  # within a warp
        (f"{PLACES.format(128)}\n{STORE}\nbar.sync 0;\n{LOAD}", None),
        (f"{PLACES.format(128)}\n{STORE}\n{LOAD}", "read that another warp has written"),
        (f"{PLACES.format(128)}\n{LOAD}\n{STORE}", "written that another warp has read"),
        (f"{PLACES.format(128)}\n{STORE}\nbar.sync 0;\n{LOAD}\nbar.sync 0;\n{STORE}", None),
        ("mov.b32 %r2, 0;\nst.shared.b32 [%r2], 7;\nst.shared.b32 [%r2], 7;", None),  # the same number
        ("mov.b32 %r2, 0;\nand.b32 %r5, %r1, 31;\nst.shared.b32 [%r2], %r5;", None),  # the same lane's, whichever
        (f"mov.b32 %r2, 0;\n{STORE}", "two warps write different numbers"),
        ("shr.u32 %r5, %r1, 5;\nshl.b32 %r2, %r5, 2;\nst.shared.b32 [%r2], %r1;", None),  # one warp's threads
        ("add.s32 %r2, %r1, 2;\nld.shared.b32 %r4, [%r2];", "misaligned"),
        ("mov.b32 %r2, 4;\nld.shared.v2.b32 {%r4, %r5}, [%r2];", "misaligned"),
        ("cp.async.ca.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x4, %r8;\ncp.async.commit_group;", "not waited for"),
        ("ld.shared.b32 %r4, [%r9];\nxor.b32 %r2, %r9, 128;\n"
         "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4, %r8;", "a copy goes where another warp has read"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_forgive(emulator, body, wrong):
    data = np.zeros(THREADS, np.uint32)
    body = f"mov.b32 %r8, 4;\nshl.b32 %r9, %r1, 2;\n{body}"
    if wrong is None:
        run(emulator, body, data)
        return
    with pytest.raises((ValueError, NotImplementedError), match=wrong):
        run(emulator, body, data)


COPY = f"""
    shl.b32 %r2, %r1, 2;
    {own("rd1", "rd4")}
    {own("rd2", "rd5")}
    setp.lt.u32 %p1, %r1, 32;
    selp.b32 %r3, 4, 0, %p1;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x4, %r3;
    cp.async.commit_group;
    cp.async.ca.shared.global [ %r2 + 256 ], [ %rd4 + 0 ], 0x4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%rd5], %r4;
"""


def test_a_copy_arrives_when_it_is_waited_for(emulator):
    """cp.async: of two groups one is still under way, and must not be touched. A size of 0 writes zeros."""
    data = np.arange(1, THREADS + 1, dtype=np.float32)
    out = np.zeros_like(data)
    run(emulator, f"{COPY}\ncp.async.wait_group 0;", data, out)
    np.testing.assert_array_equal(out, np.where(np.arange(THREADS) < 32, data, 0))
    for touch in ("ld.shared.b32 %r5, [%r2+256];", "st.shared.b32 [%r2+256], %r1;"):
        with pytest.raises(emulator.memory.Race, match="while a copy to it is under way"):
            run(emulator, f"{COPY}\n{touch}\ncp.async.wait_group 0;", data, out)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(emulator, transposed):
    """stmatrix puts what ldmatrix finds; mma multiplies it: one warp's (16, 16) by (16, 8)."""
    program = emulator.machine.Program((0, 0, 0), (1, 1, 1), 32, 4096)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    bits = {name: emulator.arith.narrow("bf16", x) for name, x in (("a", a), ("b", b))}
    corners = [bits["a"][i : i + 8, j : j + 8] for j in (0, 8) for i in (0, 8)]  # as mma's registers have them
    corners += [bits["b"][i : i + 8].T for i in (0, 8)]
    for k, matrix in enumerate(corners):
        program.bytes[128 * k : 128 * k + 128] = (
            np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8).ravel()
        )
    lanes = np.arange(32, dtype=np.uint32)
    left = program.matrices(lanes * np.uint32(16), 4, transposed)
    right = program.matrices(np.uint32(512) + lanes % np.uint32(16) * np.uint32(16), 2, transposed)
    zero = [np.zeros(1, np.uint32)] * 4
    out = np.stack([x.view(np.float32) for x in program.multiply("bf16", left, right, zero)])
    want = a @ b
    for lane in range(32):
        for k in range(4):
            assert out[k, lane] == want[lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2]
    program.store_matrices(np.uint32(1024) + lanes * np.uint32(16), left, transposed)
    np.testing.assert_array_equal(program.bytes[1024:1536], program.bytes[:512])


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("transposed", [0, 1])
def test_boxes_and_products_of_four_warps(emulator, width, transposed):
    """A tensor map's boxes, zeros beyond the tensor, as wgmma's descriptors read them: (64, 16) by (16, 8)."""
    program = emulator.machine.Program((0, 0, 0), (1, 1, 1), 128, 65536)
    rng = np.random.default_rng(1)
    numbers = rng.integers(-8, 8, (70, 80)).astype(np.float32)
    tensor = emulator.arith.narrow("bf16", numbers)
    line, one = width // 2, np.ones(1, np.uint32)
    rows, columns = (16, 64) if transposed else (64, 16)
    first = np.arange(128) == 0
    barrier, parity = np.full(1, 60000, np.uint32), np.zeros(1, np.uint32)
    program.start_barrier(barrier, one, first)
    boxes, size = -(-columns // line), 2 * rows * line
    program.expect(barrier, np.full(1, boxes * size, np.uint32), first)
    maps = emulator.hopper.Map(tensor.ctypes.data, (80, 70), 160, (line, rows), 9, {32: 1, 64: 2, 128: 3}[width])
    address = np.array([emulator.hopper.ctypes.addressof(maps)], np.uint64)
    for k in range(boxes):
        corner = np.full(1, 20 + k * line, np.uint32), np.full(1, 60, np.uint32)
        program.fetch(np.full(1, 1024 * 8 + k * size, np.uint32), address, *corner, barrier, first)
    assert np.isnan(emulator.arith.widen("bf16", program.shared[2][1024 * 4 : 1024 * 4 + 8])).all()  # not yet there
    program.wait_barrier(barrier, parity)
    program.end()
    program.wait_barrier(barrier, parity)  # over
    whole = np.zeros((rows, columns), np.float32)
    part = numbers[60:70, 20 : 20 + columns]
    whole[: part.shape[0], : part.shape[1]] = part
    descriptor = (8192 >> 4) | (size >> 4) << 16 | (8 * width >> 4) << 32 | {128: 1, 64: 2, 32: 3}[width] << 62
    found = program.tile("bf16", 0, [np.array([descriptor], np.uint64)], 64, transposed)
    np.testing.assert_array_equal(found, whole.T if transposed else whole)
    program.expect(barrier, np.full(1, 64, np.uint32), first)
    with pytest.raises(ValueError, match="waits for 64 bytes, 0 come"):
        program.wait_barrier(barrier, np.ones(1, np.uint32))


@pytest.mark.parametrize("rows", [64, 128])
def test_products_in_tensor_memory(emulator, rows):
    """tcgen05: (rows, 16) by (8, 16) transposed, twice, the second added; done when a barrier was waited for."""
    program = emulator.machine.Program((0, 0, 0), (1, 1, 1), 128, 65536)
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-8, 8, (n, 16)).astype(np.float32) for n in (rows, 8))
    one, first, barrier = np.ones(1, np.uint32), np.arange(128) == 0, np.full(1, 60000, np.uint32)
    program.start_barrier(barrier, one, first)
    program.allocate(np.full(1, 50000, np.uint32), 32, np.arange(128) < 32)
    base = int(program.shared[4][12500])
    for at, x in ((0, a), (8192, b)):  # lines of 32 bytes: 16 numbers
        where = emulator.hopper.swizzle(at + 32 * np.arange(len(x))[:, None] + 2 * np.arange(16), 32)
        program.shared[2][where // 2] = emulator.arith.narrow("bf16", x)
    left, right = (np.array([at >> 4 | 256 >> 4 << 32 | 6 << 61], np.uint64) for at in (0, 8192))
    shape = np.array([1 << 4 | 1 << 7 | 1 << 10 | 8 >> 3 << 17 | rows >> 4 << 24], np.uint32)
    to, inside = np.full(1, base, np.uint32), np.full(1, base + 16, np.uint32)
    program.tensor[emulator.blackwell.cells(base + 16, rows, 8)] = emulator.arith.narrow("bf16", a).view(np.uint32)
    program.start_product(False, False, to, left, right, shape, np.array([False]), first)
    program.start_product(False, True, to, inside, right, shape, np.array([True]), first)
    program.commit_products(barrier, first)
    halves = (True, 4) if rows == 64 else (False, 0)
    address = np.uint32(base) + (np.arange(128, dtype=np.uint32) // 32 << np.uint32(21))

    def found():
        count = 4 if rows == 64 else 8
        numbers = np.stack(program.load_tensor(address, count, *halves), 1).view(np.float32)
        return numbers.reshape(4, 2, 16, 4).swapaxes(1, 2).reshape(64, 8) if rows == 64 else numbers

    assert np.isnan(found()).all()
    with pytest.raises(ValueError, match="products were not waited for"):
        program.end()
    program.wait_barrier(barrier, np.zeros(1, np.uint32))
    np.testing.assert_array_equal(found(), 2 * a @ b.T)
    program.end()
    with pytest.raises(ValueError, match="a quarter of the lanes"):
        program.load_tensor(np.full(1, base, np.uint32), 1, False, 0)
    with pytest.raises(ValueError, match="496 columns of tensor memory asked for, 480 are left"):
        program.allocate(np.full(1, 50000, np.uint32), 496, first)


def test_what_a_copy_may_go_over(emulator):
    """What its own threads touched, and what products read that they have waited for; all, behind a barrier."""
    races, box = emulator.memory.Races(64), np.arange(32)
    races.note_read(np.arange(8), np.uint32(1 << 5))
    races.note_product(np.arange(8), np.uint32(0xF0))
    races.note_coming(box, np.uint32(1 << 5), np.uint32(0xF0))
    races.note_arrived(box)
    for own, group in ((1 << 4, 0xF0), (1 << 5, 0x0F)):
        with pytest.raises(emulator.memory.Race, match="a copy goes where"):
            races.note_coming(box, np.uint32(own), np.uint32(group))
    races.barrier()
    races.note_coming(box, np.uint32(1), np.uint32(0x0F))


@pytest.mark.parametrize("same", [True, False])
def test_warps_that_store_matrices_to_one_place(emulator, same):
    program = emulator.machine.Program((0, 0, 0), (1, 1, 1), THREADS, 1024)
    where = np.arange(THREADS, dtype=np.uint32) % 8 * 16
    register = np.arange(THREADS, dtype=np.uint32) % (32 if same else 64)
    if same:
        program.store_matrices(where, [register], False)
        return
    with pytest.raises(emulator.memory.Race, match="two warps write different numbers"):
        program.store_matrices(where, [register], False)


UNKNOWN = """
    @%p1 mov.b32 %r2, %r1; | @%p1 cp.async.commit_group; | @%p1 bar.sync 0; | div.rn.f32 %r2, %r1, %r1;
    cvt.rmi.f32.f32 %r2, %r1; | cvt.sat.f32.f32 %r2, %r1; | cvt.rz.bf16.f32 %rs1, %r1; | cvt.rm.f32.s32 %r2, %r1;
    cvt.rn.relu.bf16x2.f32 %r2, %r1, %r1; | mul.rz.f32 %r2, %r1, %r1; | mad.rn.f32 %r2, %r1, %r1, %r1;
    fma.rn.f64 %rd2, %rd1, %rd1, %rd1; | setp.lt.ftz.f32 %p2, %r1, %r1; | setp.ne.bf16 %p2, %rs1, %rs1;
    max.bf16 %rs1, %rs1, %rs1; | prmt.b32.f4e %r2, %r1, %r1, 1; | redux.sync.min.abs.f32 %r2, %r1, -1;
    shfl.sync.bfly.b32 %r2, %r1, 1, 7199, -1; | shfl.sync.down.b32 %r2, %r1, 1, 31, -1; | bar.sync 1;
    mov.pred %p2, !%p1; | add.rz.f32x2 %rd2, %rd1, %rd1; | ld.shared::cluster.b32 %r2, [%r1];
    st.global.release.gpu.b32 [%rd1], %r1; | ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r2}, [%r1];
    atom.global.add.u32 %r2, [%rd1], 1; | mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r2}, {%r2}, {%r2}, {%r2};
"""


@pytest.mark.parametrize("line", [line.strip() for line in re.split(r"\||\n", UNKNOWN) if line.strip()])
def test_what_is_not_known_is_refused(emulator, line):
    with pytest.raises(NotImplementedError, match=re.escape(line[:-1])):
        run(emulator, line, np.zeros(1))


def test_threads_that_act_as_one_do_not_part(emulator):
    """Half a warp cannot shuffle; one warp of two can load matrices, with addresses of its own alone."""
    body = """
    setp.lt.u32 %p1, %r1, {};
    mov.b32 %r2, 0;
    shl.b32 %r3, %r1, 1;
    @%p1 bra $L__BB0_1;
    {}
$L__BB0_1:
    """
    shuffle, matrix = (
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r2];",
    )
    run(emulator, body.format(32, shuffle))
    run(emulator, body.format(32, matrix))
    with pytest.raises(ValueError, match="threads wait for each other, at a barrier"):
        run(emulator, body.format(16, shuffle))


def test_what_a_mask_leaves_alone(emulator):
    """A register that is wider than what is loaded, and threads that are not to load."""
    body = f"""
    {own("rd2", "rd4")}
    mov.b16 %rs1, -1;
    setp.lt.u32 %p1, %r1, 3;
    @%p1 ld.global.b8 {{ %rs1 }}, [ %rd1 + 0 ];
    cvt.u32.u16 %r2, %rs1;
    st.global.b32 [%rd4], %r2;
    """
    byte, out = np.full(1, 7, np.uint8), np.zeros(THREADS, np.uint32)
    run(emulator, body, byte, out)
    np.testing.assert_array_equal(out, np.where(np.arange(THREADS) < 3, 7, 0xFFFF))


def test_a_warp_s_maximum_is_not_nan(emulator):
    x, out = np.arange(THREADS, dtype=np.float32), np.zeros(THREADS, np.float32)
    x[5] = np.nan
    body = f"""
    {own("rd1", "rd4")}
    {own("rd2", "rd5")}
    ld.global.b32 %r2, [%rd4];
    redux.sync.max.f32 %r3, %r2, -1;
    st.global.b32 [%rd5], %r3;
    """
    run(emulator, body, x, out)
    np.testing.assert_array_equal(out, np.repeat([31, 63], 32))
    with pytest.raises(NotImplementedError, match="a part of a warp"):
        run(emulator, body.replace("%r2, -1;", "%r2, 255;"), x, out)


def test_programs_know_their_place(emulator):
    out = np.zeros((3, 2), np.uint32)
    body = """
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %nctaid.x;
    mul.wide.u32 %rd8, %r2, 8;
    add.s64 %rd9, %rd1, %rd8;
    st.global.v2.b32 [ %rd9 + 0 ], { %r2, %r3 };
    """
    run(emulator, body, out, grid=3)
    assert out.tolist() == [[0, 3], [1, 3], [2, 3]]
