"""A progress bar with rounds per second and current metrics."""

import rich.console
import rich.progress

# Everything should fit a line of 80 characters.
_SHORT = {"accuracy": "acc"}


class Progress:
    """Used as a context; where the output is not a terminal it prints about ten lines instead."""

    def __init__(self, name: str, num_rounds: int, start: int) -> None:
        """Prepares the bar.

        Args:
            name: what is in progress.
            num_rounds: of the whole run.
            start: rounds that were done before.
        """
        self._console = rich.console.Console(soft_wrap=True)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("[bold]{task.description}"),
            rich.progress.BarColumn(bar_width=12),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[speed]}"),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            name, total=num_rounds, completed=start, speed="", metrics="compiling"
        )
        self._name, self._total, self._start = name, num_rounds, start
        self._next_line = start

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, metrics: dict[str, float]) -> None:
        """Moves the bar.

        Args:
            done: rounds so far.
            metrics: the newest values, by name.
        """
        text = " ".join(f"{_SHORT.get(name, name)} {value:.3f}" for name, value in metrics.items())
        seconds = self._bar.tasks[0].elapsed or 0.0
        # The first block includes compiling: the rate is too low at first and gets better.
        speed = f"{(done - self._start) / seconds:.1f}/s" if seconds and done > self._start else ""
        self._bar.update(self._task, completed=done, speed=speed, metrics=text)
        if not self._console.is_terminal and (done >= self._next_line or done == self._total):
            self._console.print(
                f"{self._name} {done}/{self._total} rounds {speed} {text}", highlight=False
            )
            self._next_line = done + max(self._total // 10, 1)
