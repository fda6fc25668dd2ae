"""A process of its own for what may crash, hang or leave a GPU unusable: what it had answered before is not lost."""

import multiprocessing

SILENCE = 120.0  # seconds without a word after which it is taken to hang: more than compiling an entry takes


class Worker:
    """``ask(request)`` is answered by ``make(*arguments)(request, say)`` in the process; a new one follows a lost one.

    Close it at the end. Args:
        make: a function of a module, called once a process.
    """

    def __init__(self, make, *arguments, silence=SILENCE):
        self.start, self.silence, self.process, self.pipe = (make, arguments), silence, None, None

    def ask(self, request, hear):
        """-> (answer, None) or (None, why the process was lost); ``hear`` gets what it says meanwhile."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, *self.start))
            process.start()
            self.process = process
            theirs.close()  # so that the pipe ends when the process does
        try:
            self.pipe.send(request)
            while self.pipe.poll(self.silence):
                kind, value = self.pipe.recv()
                if kind == "answer":
                    return value, None
                if kind == "error":
                    self.close()
                    return None, value
                hear(value)
            why = f"failed: no word in {self.silence:.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            why = f"failed: its process ended with {self.process.exitcode}"
        self.close()
        return None, why

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            self.pipe.close()
            self.process = None


def serve(pipe, make, arguments):
    """The process: answers until an exception, after which nothing on its device is to be trusted."""
    from bench.measure import reason_of

    try:
        answer = make(*arguments)
        while True:
            pipe.send(("answer", answer(pipe.recv(), lambda text: pipe.send(("said", text)))))
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        pipe.send(("error", reason_of(error)))
        raise
