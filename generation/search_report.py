"""What comes out of a comparison of searches: figures at some budgets, paired differences, tables and a plot."""

from pathlib import Path

import numpy as np

from build_nas_dataset.statistics import bootstrap_interval

BUDGETS = (50, 100, 192, 300)  # queries at which figures are printed


def summary_of(figures: dict[str, np.ndarray], seconds: dict[str, float], budgets: list[int]) -> dict:
    """Figures of every method at the budgets, and what nag has more than each of the others, repeat by repeat.

    figures: method -> (repeats, queries) fractions. seconds: method -> mean processor time of a search.
    """
    methods = {}
    for name, of_method in figures.items():
        at = {str(n): _figure(100 * of_method[:, n - 1]) for n in budgets}
        methods[name] = {"repeats": len(of_method), "seconds": round(seconds[name], 2), "at": at}
    found = {"budgets": budgets, "methods": methods}
    if "nag" in figures:
        others = [name for name in figures if name != "nag"]
        found["nag_minus"] = {
            name: {str(n): _difference(100 * (figures["nag"] - figures[name])[:, n - 1]) for n in budgets}
            for name in others
        }
    return found


def _figure(values: np.ndarray) -> dict:
    """Mean, standard deviation and values, in per cent."""
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": std, "values": values.round(4).tolist()}


def _difference(values: np.ndarray) -> dict:
    """Mean of the paired differences and its 95 % bootstrap interval, in percentage points."""
    low, high = bootstrap_interval(np.mean, values) if len(values) > 1 else (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high}


def tables_of(summary: dict) -> str:
    """The summary as two Markdown tables."""
    budgets = [str(n) for n in summary["budgets"]]
    lines = [f"| search | {' | '.join(budgets)} | processor time |", "|---" * (len(budgets) + 2) + "|"]
    for name, method in summary["methods"].items():
        cells = [_shown(method["at"][n]) for n in budgets]
        lines.append(f"| {name} ({method['repeats']} repeats) | {' | '.join(cells)} | {method['seconds']:.1f} s |")
    if "nag_minus" in summary:
        lines += ["", f"| nag minus | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
        for name, at in summary["nag_minus"].items():
            cells = [_shown_difference(at[n]) for n in budgets]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(figure: dict) -> str:
    return f"{figure['mean']:.3f}" + ("" if figure["std"] is None else f" ({figure['std']:.3f})")


def _shown_difference(at: dict) -> str:
    interval = "" if at["low"] is None else f" ({at['low']:+.3f} to {at['high']:+.3f})"
    return f"{at['mean']:+.3f}{interval}"


def print_tables(summary: dict) -> None:
    print(f"signal: {summary['accuracy']}; figure: {summary['test_accuracy']} of the best query by the signal")
    print("figures: per cent, mean (standard deviation) over the repeats; differences: points, with 95 % intervals")
    if summary["noise_of_accuracy"] is not None:
        noise = 100 * summary["noise_of_accuracy"]
        print(f"standard deviation of the signal between two trainings of a cell: {noise:.1f} points")
    print(f"best of all cells: {100 * summary['optimum']:.3f}\n\n{tables_of(summary)}")


def draw_regret(path: Path, figures: dict[str, np.ndarray], optimum: float) -> None:
    """A plot of the mean regret, what is lacking to the best of all cells, with 95 % intervals of the mean."""
    from matplotlib.figure import Figure  # imported late: it takes a second

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="queries", ylabel="regret (percentage points)", yscale="log")
    for name, of_method in figures.items():
        regret, queries = 100 * (optimum - of_method), np.arange(1, of_method.shape[1] + 1)
        mean = regret.mean(0)
        half = 1.96 * regret.std(0) / np.sqrt(len(regret))
        (line,) = axes.plot(queries, mean, label=name)
        axes.fill_between(queries, np.maximum(mean - half, 1e-3), mean + half, color=line.get_color(), alpha=0.2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
