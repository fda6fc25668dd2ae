"""A kernel launched chunk after chunk: its arguments are bound once.

``kernel[grid](...)`` binds every argument, asks of each what is compiled for it and compares the globals with those it
was compiled with: most of the host's time of a launch. It returns the compiled kernel, and ``compiled[grid](...)``
launches that as it is, on the current stream, with Triton's launch hooks.
"""

from triton.compiler import CompiledKernel


class Launch:
    """Of one kernel in one pass over the chunks: everything but some numbers stays.

    The numbers must not change what the kernel is compiled for: 32-bit ones that are marked do_not_specialize. Where
    one is not marked, where the kernel has hooks of its own or was not compiled (the interpreter, a recorder), every
    launch is bound anew.
    """

    def __init__(self, kernel, /, **fixed):
        self.kernel, self.fixed, self.compiled = kernel, fixed, None

    def __call__(self, programs, /, **numbers):
        if self.compiled is None:
            self.keep(self.kernel[(programs,)](**self.fixed, **numbers), numbers)
            return
        for name, number in numbers.items():
            self.values[self.places[name]] = number
        self.compiled[(programs, 1, 1)](*self.values)

    def keep(self, compiled, numbers):
        """What the next launches need, in the signature's order."""
        kernel = self.kernel
        if not isinstance(compiled, CompiledKernel) or getattr(kernel, "pre_run_hooks", None):
            return
        if set(numbers) <= set(getattr(kernel, "do_not_specialize", ())):
            arguments = {**self.fixed, **numbers}
            self.values = [arguments[name] for name in kernel.arg_names]
            self.places = {name: kernel.arg_names.index(name) for name in numbers}
            self.compiled = compiled
