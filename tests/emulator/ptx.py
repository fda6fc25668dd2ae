"""PTX of a kernel to Python: a function of a program and its arguments, each instruction a line on numpy arrays.

What is known is what Triton 3.6 and 3.7 make of our kernels for sm_80, 86, 89, 90, 100 and 120; anything else raises.
"""

import re

import arith
import numpy as np
from memory import UNSIGNED, Waits

WIDTHS = {"b8": 1, "s8": 1, "u8": 1, "b16": 2, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "b32": 4, "s32": 4, "u32": 4,
          "f32": 4, "b64": 8, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
REGISTERS = {"r": 4, "rd": 8, "rs": 2}
INTEGERS = {"div", "rem", "max", "min"}  # what is another operation on them than on floats
FLOAT_COMPARE = {  # with u: true for a NaN
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})", "nan": "np.isnan({0}) | np.isnan({1})",
    "num": "~(np.isnan({0}) | np.isnan({1}))",
}  # fmt: skip
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
SIMPLE = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "neg": "-{0}", "abs": "np.abs({0})",
    "max": "np.maximum({0}, {1})", "min": "np.minimum({0}, {1})", "max.f": "np.fmax({0}, {1})",
    "min.f": "np.fmin({0}, {1})", "max.NaN": "np.maximum({0}, {1})", "fma": "m.fma({0}, {1}, {2})",
    "div": "m.divide({0}, {1})", "rem": "m.remainder({0}, {1})", "div.full": "m.ratio({0}, {1})",
    "div.approx": "m.rough_ratio({0}, {1})",
    "ex2.approx": "m.exp2({0})", "sqrt.approx": "np.sqrt({0})", "rsqrt.approx": "1 / np.sqrt({0})",
}  # fmt: skip
LETTERS = {"b": "u", "u": "u", "s": "i", "f": "f"}  # numpy's of PTX's
PACKED = {"f32x2": (8, "f4"), "s16x2": (4, "i2")}  # two numbers in one register: its width, their type
MASKED = {"ld", "st", "cp", "mbarrier", "tcgen05"}  # what a predicate may stand before, beside branches
TOGETHER = {  # how many threads do it as one
    "shfl.": 32, "redux.": 32, "mma.sync": 32, "ldmatrix.": 32, "stmatrix.": 32, "elect.": 32, "wgmma.": 128,
    "cp.async.commit_group": 0, "cp.async.wait_group": 0, "tcgen05.ld": 32, "tcgen05.st": 32, "tcgen05.alloc": 32,
}  # fmt: skip
BOX = ["tensor", "2d", "shared::cta", "global", "mbarrier::complete_tx::bytes"]  # cp.async.bulk
COMMENT = re.compile(r"//.*")
INSTRUCTION = re.compile(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);$")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
REGISTER = re.compile(r"%((rd|rs|r|p)\d+)\b")
PARAMETER = re.compile(r"^\s*\.param \.(\w+)", re.MULTILINE)
WAITING = re.compile(r"(waitLoop|skipWait):|@!complete bra.*")  # the loop about a wait
MEETING = re.compile(r"\b(bar|barrier)\.sync\b|mbarrier\.try_wait")  # where threads wait for others
SKIPPING = re.compile(r"@!(%p\d+) bra.uni skipWait;")
ASSIGNMENT = re.compile(r"((?:\w+, )*\w+)(,?) = (.*)")


def listed(text):
    """["%r1", "%r2"] of "{ %r1, %r2 }"."""
    return [x.strip() for x in text.strip("{} ").split(",")]


def targets(text):
    """Their names as Python's variables."""
    return [x[1:] for x in listed(text)]


def width_of(register):
    """In bytes."""
    return REGISTERS[re.match(r"%?([a-z]+)", register)[1]]


def require(known):
    """Anything else is not known here."""
    if not known:
        raise NotImplementedError


def mask_of(inverted, predicate):
    return f"~{predicate}" if inverted else predicate


class Kernel:
    """``parameters``: their widths in bytes; ``threads`` of a program.

    Two translations: a Python function for threads that stay together, and, once they part, each block of
    instructions for those threads that are at it.
    """

    def __init__(self, text):
        lines = [COMMENT.sub("", line).strip() for line in text.splitlines()]
        self.name = re.search(r"\.entry (\w+)\(", text)[1]
        # 0: by its address
        self.parameters = [0 if kind == "align" else WIDTHS[kind] for kind in PARAMETER.findall(text)]
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        self.names = {"np": np, "m": arith}
        self.blocks = self.split(lines[lines.index("{") + 1 : len(lines) - lines[::-1].index("}") - 1])
        self.labels, self.unset = {label: k for k, (label, _) in enumerate(self.blocks)}, set()
        text = "\n".join(line for _, lines in self.blocks for line in lines)
        self.registers = {name: REGISTERS.get(kind, 0) for name, kind in REGISTER.findall(text)}  # bytes; predicates: 0
        self.parted = {}  # the second translation, {block: (code, how many threads act as one in it)}
        self.active = None  # its name for the threads that are at a block
        self.source = self.together()
        exec(compile(self.source, f"<{self.name}>", "exec"), self.names)

    def run(self, program, arguments):
        parted = self.names["run"](program, arguments)
        if parted is not None:
            self.run_parted(program, *parted)
        program.end()

    def run_parted(self, program, at, registers):
        """at: the block that each thread is at. Those furthest behind go first, so that they meet again, but for those
        that wait for others."""
        for name, width in self.registers.items():
            registers.setdefault(name, self.names[self.constant(-1, width)] if width else np.array([False]))
        program.at, waiting = at, set()
        while (at < len(self.blocks)).any():
            first = min({*at.tolist()} - {len(self.blocks)} - waiting, default=None)
            if first is None:
                raise ValueError("threads wait for each other, at a barrier (which must be one place) or to act as one")
            if first not in self.parted:
                text = "\n".join(self.apart(first))
                self.parted[first] = compile(text, f"<{self.name}, block {first}>", "exec"), self.acting(first)
            code, size = self.parted[first]
            registers |= self.names | {"active": at == first}
            try:
                program.check_whole(at == first, size)
                exec(code, registers)
                waiting.clear()
            except Waits:
                waiting.add(first)

    def acting(self, block):
        """How many threads do some instruction of a block as one."""
        sizes = (size for line in self.blocks[block][1] for name, size in TOGETHER.items() if name in line)
        return max((size or self.threads for size in sizes), default=1)

    def split(self, lines):
        """[(label, [instruction])]"""
        out, guard = [(None, [])], ""  # guard: the predicate of a wait, which PTX writes as a branch around its loop
        for line in lines:
            if skipping := SKIPPING.match(line):
                guard = f"@{skipping[1]} "
                continue
            if line.startswith("mbarrier.try_wait"):
                line, guard = guard + line, ""
            if not line or line.startswith((".", "$L__tmp", "$L__func")) or line in "{}" or WAITING.match(line):
                continue
            if line.endswith(":"):
                out.append((line[:-1], []))
                continue
            if MEETING.search(line) and out[-1][1]:
                out.append((None, []))
            out[-1][1].append(line)
            if "bra" in line:
                out.append((None, []))
        return out

    def together(self):
        """-> the source of a function that ends with None, or where threads part with (block, registers)."""
        out = []
        for k, (_, lines) in enumerate(self.blocks):
            out.append(f"        if block == {k}:")
            for line in lines:
                out += [f"            {text.replace('NEXT', str(k + 1))}" for text in self.instruction(line)]
            out.append(f"            block = {k + 1}")
        found = filter(None, (ASSIGNMENT.fullmatch(line.strip()) for line in out))
        ever = {name for match in found for name in match[1].split(", ")}  # a half that nobody reads is not
        self.unset |= {name for name, width in self.registers.items() if width and name not in ever}
        unset = [f"    {x} = {self.constant(-1, width_of(x))}" for x in sorted(self.unset)]
        return "\n".join(["def run(program, arguments):", *unset, "    block = 0", "    while True:", *out])

    def apart(self, block):
        """-> the lines of a block for the threads that are ``active``."""
        out, self.active = [], "active"
        for line in self.blocks[block][1]:
            inverted, predicate, name, rest = INSTRUCTION.match(line).groups()
            mask = "active" if predicate is None else f"(active & {mask_of(inverted, predicate)})"
            if name.split(".")[0] == "bra":
                out += [f"taken = {mask}", f"program.at[taken] = {self.labels[rest]}", "active = active & ~taken"]
                continue
            if re.match(r"(bar|barrier)\.sync", name):
                self.instruction(line)  # known at all
                out.append(f"program.meet(active, {len(self.blocks)})")
                continue
            if name == "ret":
                out += [f"program.at[active] = {len(self.blocks)}", "active = active & False"]
                continue
            for text in self.instruction(line, mask):
                found = ASSIGNMENT.fullmatch(text)
                if found is None:
                    out.append(text)
                elif found[2]:
                    out.append(f"{found[1]}, = [np.where(active, *both) for both in zip({found[3]}, [{found[1]}])]")
                else:
                    out.append(f"{found[1]} = np.where(active, {found[3]}, {found[1]})")
        return [*out, f"program.at[active] = {block + 1}"]

    # operands

    def constant(self, bits, width):
        name = f"c{width}_{bits & (1 << 8 * width) - 1:x}"
        self.names[name] = np.array([bits & (1 << 8 * width) - 1], UNSIGNED[width])
        return name

    def value(self, text, width):
        """Of the operand's bits."""
        if text.startswith("%tid."):
            return "program.thread" if text == "%tid.x" else self.constant(0, 4)
        if text.startswith(("%ctaid.", "%nctaid.")):
            where = "place" if text.startswith("%c") else "grid"
            return f"np.array([program.{where}[{'xyz'.index(text[-1])}]], np.uint32)"
        if "_param_" in text:
            return f"arguments[{int(text.rpartition('_')[2])}]"
        if text.startswith("%"):
            require(width_of(text) == width)
            return text[1:]
        if text.startswith("global_smem"):
            return self.constant(int(text[len("global_smem") :] or 0), width)
        if text.startswith(("0f", "0d")):
            return self.constant(int(text[2:], 16), width)
        return self.constant(int(text.rstrip("U"), 0), width)

    def typed(self, text, kind):
        """Of its number."""
        if kind == "pred":
            require(re.fullmatch(r"%p\d+|-?1|0", text))
            return text[1:] if text.startswith("%") else f"np.array([{text != '0'}])"
        held = width_of(text) if text.startswith("%r") else WIDTHS[kind]  # a register may be wider
        value = self.value(text, held)
        if kind in ("bf16", "f16"):
            return f"m.widen({kind!r}, {value})"
        if WIDTHS[kind] < held:
            value = f"{value}.astype('u{WIDTHS[kind]}')"
        return value if kind[0] in "bu" else f"{value}.view('{LETTERS[kind[0]]}{WIDTHS[kind]}')"

    def bits(self, expression, kind):
        """A result as what its register holds."""
        if kind in ("bf16", "f16"):
            return f"m.narrow({kind!r}, {expression})"
        return f"({expression}).view('u{WIDTHS[kind]}')"

    def address(self, text):
        name, _, offset = (part.strip() for part in text.strip("[] ").replace(" ", "").partition("+"))
        base = self.value(name, 8 if name.startswith("%rd") else 4)
        return base if offset in ("", "0") else f"{base} + {self.constant(int(offset, 0), 8 if 'rd' in name else 4)}"

    # instructions

    def instruction(self, line, active=None):
        """-> Python statements. active: what masks them instead of the line's own predicate, where they can be."""
        match = INSTRUCTION.match(line)
        if match is None:
            raise NotImplementedError(line)
        inverted, predicate, name, rest = match.groups()
        base, *words = name.split(".")
        mask = mask_of(inverted, predicate)
        if active is not None and base in MASKED:
            mask = active
        operands = OPERAND.findall(rest)
        try:
            alone = base == "bra" or (base in MASKED and not re.match(r"cp\.async\.(commit|wait)|tcgen05\.ld", name))
            require(predicate is None or alone)
            known = getattr(self, "do_" + base, None)
            return self.simple(base, words, operands) if known is None else known(words, operands, mask)
        except (NotImplementedError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise NotImplementedError(line) from error

    def simple(self, base, words, operands):
        kind = words[-1]
        if base == "abs" and kind in ("bf16x2", "f16x2"):
            return [f"{operands[0][1:]} = {self.value(operands[1], 4)} & {self.constant(0x7FFF7FFF, 4)}"]
        if kind in PACKED or words[-2:-1] == ["f32"]:
            return self.packed(base, words, operands)
        require(kind not in ("bf16", "f16") or base == "abs")
        require(base != "fma" or kind == "f32")
        flushed = "ftz" in words
        key = ".".join([base, *(word for word in words[:-1] if word not in ("rn", "ftz"))])
        text = SIMPLE.get(f"{key}.f" if kind[0] == "f" and key in INTEGERS else key)
        if text is not None and key.startswith(("max", "min")) and len(operands) == 4:  # of three
            text = text.format(text, "{2}")
        require(text is not None and len(set(re.findall(r"\{\d\}", text))) == len(operands) - 1)
        sources = [self.typed(x, kind) for x in operands[1:]]
        if kind == "pred":
            return [f"{operands[0][1:]} = {text.format(*sources)}"]
        if flushed:
            sources = [f"m.flush({x})" for x in sources]
        result = text.format(*sources)
        if flushed:
            result = f"m.flush({result})"
        return [f"{operands[0][1:]} = {self.bits(result, kind)}"]

    def packed(self, base, words, operands):
        """Of two numbers in a register; or a sum, in float32, of terms that are 16 bits wide."""
        kind = words[-1]
        require(words in ([kind], ["rn", kind], ["rn", "f32", kind]) and base in ("add", "sub", "mul", "fma"))
        if kind in PACKED:
            held, of_one = PACKED[kind]
            sources = [f"m.pairs({self.value(x, held)}, '{of_one}')" for x in operands[1:]]
            return [f"{operands[0][1:]} = m.as_one({SIMPLE[base].format(*sources)}, 'u{held}')"]
        sources = [self.typed(x, "f32" if width_of(x) == 4 else kind) for x in operands[1:]]
        return [f"{operands[0][1:]} = {self.bits(SIMPLE[base].format(*sources), 'f32')}"]

    def do_mov(self, words, operands, mask):
        kind, (to, source) = words[0], operands
        if to.startswith("{"):
            half = WIDTHS[kind] // 2
            parts = targets(to)  # "_": a half that nobody wants
            value = self.value(source, 2 * half)
            return [f"{part} = ({value} >> {self.constant(8 * half * k, 2 * half)}).astype('u{half}')"
                    for k, part in enumerate(parts) if part]  # fmt: skip
        if source.startswith("{"):
            half = WIDTHS[kind] // 2
            low, high = (self.value(x, half) for x in listed(source))
            return [f"{to[1:]} = {low}.astype('u{2 * half}') | "
                    f"{high}.astype('u{2 * half}') << {self.constant(8 * half, 2 * half)}"]  # fmt: skip
        return [f"{to[1:]} = {self.typed(source, kind) if kind == 'pred' else self.value(source, WIDTHS[kind])}"]

    def do_bra(self, words, operands, mask):
        target = self.labels[operands[0]]
        jump = [f"block = {target}", "continue"]
        if mask is None:
            return jump
        return [f"taken = {mask}", "if taken.all():", *(f"    {x}" for x in jump),
                "if taken.any():", f"    return np.where(program.every(taken), {target}, NEXT), locals()"]  # fmt: skip

    def do_ret(self, words, operands, mask):
        return ["return None"]

    def do_bar(self, words, operands, mask):
        if words == ["warp", "sync"]:
            return []
        require(words in (["sync"], ["sync", "aligned"]) and operands == ["0"])  # of all threads of the program
        return ["program.races.barrier()"]

    do_barrier = do_bar

    def do_ld(self, words, operands, mask):
        space, width = self.space_of(words, ("param", "global", "shared", "shared::cta"))
        if space == "param":
            index = int(re.search(r"_param_(\d+)", operands[1])[1])
            return [f"{operands[0][1:]} = arguments[{index}]{self.widened(words[-1], width_of(operands[0]))}"]
        to = targets(operands[0])
        held = self.widened(words[-1], width_of(to[0]))
        self.unset |= {x for x in to if mask}  # a masked load may leave what was there, which nothing may depend on
        call = f"program.load_{space}({self.address(operands[1])}, {len(to)}, {width}, {mask})"
        if held:
            call = f"[x{held} for x in {call}]"
        if mask:
            call = f"[np.where({mask}, *both) for both in zip({call}, [{', '.join(to)}])]"
        return [f"{', '.join(to)}, = {call}"]

    def space_of(self, words, spaces):
        """-> (a load's or store's space, bytes of a number)."""
        require(words[0] in spaces and all(re.fullmatch(r"v[24]", word) for word in words[1:-1]))
        return words[0].split(":")[0], WIDTHS[words[-1]]

    def widened(self, kind, width):
        """What makes of bits those of a register, which may be wider."""
        if WIDTHS[kind] == width:
            return ""
        letter = LETTERS[kind[0]]
        return f".view('{letter}{WIDTHS[kind]}').astype('{letter}{width}').view('u{width}')"

    def do_st(self, words, operands, mask):
        space, width = self.space_of(words, ("global", "shared", "shared::cta"))
        values = [self.typed(x, f"b{8 * width}") for x in listed(operands[1])]
        return [f"program.store_{space}({self.address(operands[0])}, [{', '.join(values)}], {width}, {mask})"]

    def do_fence(self, words, operands, mask):
        return []

    def do_cvta(self, words, operands, mask):
        return [f"{operands[0][1:]} = {self.value(operands[1], 8)}"]

    def do_elect(self, words, operands, mask):
        return [f"{operands[0].rpartition('%')[2]} = program.leaders()"]

    def do_mbarrier(self, words, operands, mask):
        if words[0] == "init":
            return [f"program.start_barrier({self.address(operands[0])}, {self.value(operands[1], 4)}, {mask})"]
        if words[0] == "inval":
            return [f"program.end_barrier({self.address(operands[0])}, {mask})"]
        address, number = self.address(operands[1]), self.value(operands[2], 4)
        if words[0] == "try_wait":
            return [f"program.wait_barrier({address}, {number}, {mask})"]
        require(words[:2] == ["arrive", "expect_tx"])
        return [f"program.expect({address}, {number}, {mask})"]

    def do_wgmma(self, words, operands, mask):
        if words[0] != "mma_async":
            return []
        columns = int(re.fullmatch(r"m64n(\d+)k16", words[3])[1])
        require(words[4] == "f32" and operands[4:6] == ["1", "1"])
        to = targets(operands[0])
        a, b = ([self.value(x, width_of(x)) for x in listed(text)] for text in operands[1:3])
        transposed = [int(x) for x in operands[6:]]
        keep = self.typed(operands[3], "pred")
        return [f"{', '.join(to)}, = program.multiply_group({words[5]!r}, {columns}, [{', '.join(to)}], "
                f"[{', '.join(a)}], [{', '.join(b)}], {keep}, {transposed})"]  # fmt: skip

    def do_tcgen05(self, words, operands, mask):
        base = words[0]
        if base in ("wait::ld", "wait::st", "dealloc", "relinquish_alloc_permit"):
            return []
        if base == "alloc":
            return [f"program.allocate({self.address(operands[0])}, {int(operands[1])}, {mask})"]
        if base == "commit":
            return [f"program.commit_products({self.address(operands[0])}.astype(np.uint32), {mask})"]
        if base == "mma":
            require(words[1] == "cta_group::1" and words[2] in ("kind::f16", "kind::tf32") and len(operands) == 5)
            to, left = (self.address(x) if x[0] == "[" else self.value(x, 8) for x in operands[:2])
            right, shape, keep = self.value(operands[2], 8), self.value(operands[3], 4), self.typed(operands[4], "pred")
            how = f"{'tf32' in words[2]}, {operands[1][0] == '['}"  # whether the left side lies in tensor memory
            return [f"program.start_product({how}, {to}, {left}, {right}, {shape}, {keep}, {mask})"]
        lists = [listed(x) for x in operands if x.startswith("{")]
        require(base in ("ld", "st") and words[3] in ("32x32b", "16x32bx2"))
        require(words[1:3] + words[4:] == ["sync", "aligned", f"x{len(lists[0])}", "b32"])
        second = next((int(x) for x in operands if x.isdigit()), 0)
        (address,) = (self.address(x) for x in operands if x.startswith("["))
        how = f"{words[3] == '16x32bx2'}, {second}"
        if base == "ld":
            to = [x[1:] for x in lists[0]]
            return [f"{', '.join(to)}, = program.load_tensor({address}, {len(to)}, {how})"]
        values = ", ".join(self.value(x, 4) for x in lists[0])
        return [f"program.store_tensor({address}, [{values}], {how}, {mask})"]

    def do_cp(self, words, operands, mask):
        if words[1] == "bulk":
            space = words[4].replace("cluster", "cta")  # of clusters of one program
            require([*words[2:4], space, *words[5:]] == BOX)
            tensor, column, row = re.fullmatch(r"\[(\S+), \{(\S+), (\S+)\}\]", operands[1]).groups()
            to, address = self.address(operands[0]), self.address(operands[2])
            column, row = self.value(column, 4), self.value(row, 4)
            return [f"program.fetch({to}, {self.value(tensor, 8)}, {column}, {row}, {address}, {mask})"]
        if words[1] == "commit_group":
            return ["program.commit()"]
        if words[1] == "wait_group":
            return [f"program.wait({int(operands[0])})"]
        require(words[1] in ("ca", "cg") and words[2:] == ["shared", "global"] and len(operands) in (3, 4))
        size = int(operands[2], 0)
        filled = self.value(operands[3], 4) if len(operands) > 3 else self.constant(size, 4)
        return [f"program.copy({self.address(operands[0])}, {self.address(operands[1])}, {size}, {filled}, {mask})"]

    def do_ldmatrix(self, words, operands, mask):
        to = targets(operands[0])
        self.check_matrices(words, to)
        call = f"program.matrices({self.address(operands[1])}, {len(to)}, {'trans' in words}, {self.active})"
        return [f"{', '.join(to)}, = {call}"]

    def do_stmatrix(self, words, operands, mask):
        values = [self.value(x, 4) for x in listed(operands[1])]
        self.check_matrices(words, values)
        how = f"{'trans' in words}, {self.active}"
        return [f"program.store_matrices({self.address(operands[0])}, [{', '.join(values)}], {how})"]

    def check_matrices(self, words, registers):
        plain = [word for word in words if word != "trans"]
        require(plain == ["sync", "aligned", "m8n8", f"x{len(registers)}", "shared", "b16"])

    def do_mma(self, words, operands, mask):
        require(words[2:6] == ["m16n8k16", "row", "col", "f32"] and words[6] == words[7] and words[8] == "f32")
        to, *sources = ([self.value(x, 4) for x in listed(group)] for group in operands)
        groups = ", ".join(f"[{', '.join(group)}]" for group in sources)
        return [f"{', '.join(to)}, = program.multiply({words[6]!r}, {groups})"]

    def do_shfl(self, words, operands, mask):
        to, x, by, limit, threads = operands
        require(
            words[:2] in (["sync", "bfly"], ["sync", "idx"], ["sync", "up"])
            and threads == "-1"
            and limit == ("0" if words[1] == "up" else "31")
        )
        width = WIDTHS[words[-1]]
        call = f"program.shuffle({words[1]!r}, {self.value(x, width)}, {self.value(by, 4)}, {int(limit)})"
        return [f"{to[1:]} = {call}"]

    def do_redux(self, words, operands, mask):
        require(words[0] == "sync" and len(words) == 3)
        functions = {"add": "np.add", "max": "np.maximum", "min": "np.minimum", "or": "np.bitwise_or"}
        function = functions[words[1]] if words[2] != "f32" else {"max": "np.fmax", "min": "np.fmin"}[words[1]]
        to, x, threads = operands
        call = f"program.reduce({function}, {self.typed(x, words[-1])}, {self.value(threads, 4)})"
        return [f"{to[1:]} = {self.bits(call, words[-1])}"]

    def do_setp(self, words, operands, mask):
        compare, kind = words
        require(kind not in ("bf16", "f16"))
        text = FLOAT_COMPARE[compare] if kind[0] == "f" else f"{{0}} {COMPARE[compare]} {{1}}"
        return [f"{operands[0][1:]} = {text.format(*(self.typed(x, kind) for x in operands[1:]))}"]

    def do_selp(self, words, operands, mask):
        width = WIDTHS[words[-1]]
        to, a, b, choice = operands
        return [f"{to[1:]} = np.where({choice[1:]}, {self.value(a, width)}, {self.value(b, width)})"]

    def do_mul(self, words, operands, mask):
        if words[-1] in PACKED:
            return self.packed("mul", words, operands)
        return self.product(words, operands, None)

    def do_mad(self, words, operands, mask):
        return self.product(words, operands[:3], operands[3])

    def product(self, words, operands, added):
        kind = words[-1]
        if kind[0] == "f":
            require(words in ([kind], ["rn", kind]) and added is None)
        else:
            require(words in (["lo", kind], ["hi", kind], ["wide", kind]))
        to, a, b = operands[0][1:], *(self.typed(x, kind) for x in operands[1:3])
        width = WIDTHS[kind]
        if words[0] in ("wide", "hi"):
            wide = f"{'i' if kind[0] == 's' else 'u'}{2 * width}"
            text = f"({a}.astype('{wide}') * {b}.astype('{wide}')).view('u{2 * width}')"
            if words[0] == "hi":
                text = f"({text} >> {self.constant(8 * width, 2 * width)}).astype('u{width}')"
            width = 2 * width if words[0] == "wide" else width
        else:
            text = f"({a} * {b}).view('u{width}')"
        return [f"{to} = {text}" + ("" if added is None else f" + {self.value(added, width)}")]

    def do_shl(self, words, operands, mask):
        return self.shifted("np.left_shift", words[-1], operands)

    def do_shr(self, words, operands, mask):
        return self.shifted("np.right_shift", words[-1], operands)

    def shifted(self, function, kind, operands):
        call = f"m.shift({function}, {self.typed(operands[1], kind)}, {self.value(operands[2], 4)})"
        return [f"{operands[0][1:]} = {self.bits(call, kind)}"]

    def do_bfe(self, words, operands, mask):
        to, x, *field = operands
        call = f"m.extract({self.typed(x, words[-1])}, {', '.join(self.value(f, 4) for f in field)})"
        return [f"{to[1:]} = {self.bits(call, words[-1])}"]

    def do_prmt(self, words, operands, mask):
        to, *rest = operands
        require(words == ["b32"])
        return [f"{to[1:]} = m.permute({', '.join(self.value(x, 4) for x in rest)})"]

    def do_popc(self, words, operands, mask):
        return [f"{operands[0][1:]} = m.count_bits({self.value(operands[1], WIDTHS[words[-1]])})"]

    def do_cvt(self, words, operands, mask):
        *how, to, source = words
        target = operands[0][1:]
        narrow = to in ("bf16", "f16", "bf16x2", "f16x2")
        if source[0] in "su":
            wanted = [] if to[0] in "su" else ["rn"]
        elif to[0] in "su":
            wanted = ["rzi"]
        else:
            wanted = ["rn"] if narrow else ["rpi"] if to == source == "f64" else []
        require(how == wanted and (to != source or how == ["rpi"]))
        require(len(operands) == (3 if to.endswith("x2") else 2))
        if to in ("bf16x2", "f16x2"):
            high, low = (f"m.narrow({to[:-2]!r}, {self.typed(x, source)})" for x in operands[1:])
            return [f"{target} = m.pack({low}, {high})"]
        x = self.typed(operands[1], source)
        if to in ("bf16", "f16"):
            require(source in ("f32", "bf16", "f16"))
            return [f"{target} = m.narrow({to!r}, {x})"]
        if source in ("bf16", "f16"):
            require(to == "f32")
            return [f"{target} = {x}.view('u4')"]
        if how == ["rpi"]:
            x = f"np.ceil({x})"
        elif how == ["rzi"]:
            wide = source == "f64" or WIDTHS[to] == 8  # a NaN becomes the highest bit alone
            x = f"m.truncated({x}, '{LETTERS[to[0]]}{WIDTHS[to]}', {wide})"
        text = f"{x}.astype('{LETTERS[to[0]]}{WIDTHS[to]}').view('u{WIDTHS[to]}')"
        return [f"{target} = {text}{self.widened(to, width_of(target))}"]
