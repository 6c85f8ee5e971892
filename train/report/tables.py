"""docs/paper.md from docs/paper.json, and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from train.evaluation.small import AS_IS, BLUR, ITSELF, NOISE, PURIFIERS
from train.loops.schedule import settings_told
from train.networks.classifiers import JUDGES, PAPER
from train.report import printed
from train.report.printed import MODELS, RATIOS
from train.reproduce import SCHEDULES
from train.settings import KINDS

Told = dict[str, Any]

_TITLES = {
    "reduced": "Reduced schedule (for a CPU)",
    "short": "Short schedule (for one GPU, a quarter of an hour)",
    "full": "Full schedule (the paper's)",
}
_RUN_FILES = "../train/runs/paper"
_RELIABLE = 90.0
"""Percent of the originals that a classifier should read before its misreading of others means anything."""
_DASH = "–"
_OURS = ("adv-csnet-e", "adv-csnet-s")
_CHANCE = 10.0
_ABLATION, _ABLATED_E, _ABLATED_S = "ablation-", "ablation-base-r10", "adv-csnet-s-r10"
_ABLATED = {_ABLATED_E: "adv-csnet-e-r10", _ABLATED_S: "adv-csnet-s-r10"}
"""What ablations start from, and the model that this stands for."""


def render(paper: Told) -> str:
    """The page."""
    lines = [
        "# The paper's tables and figures, reproduced",
        "",
        "The paper: *An image compressed sensing method based on adversarial examples*. Written by `veilcam-train",
        "report` from the runs of `veilcam-train reproduce`; the same numbers stand in [paper.json](paper.json).",
        "",
        "S samples pictures at a ratio r, G reconstructs them: together they are the CSNet. Of a veiled model G has",
        "learned to lead classifiers astray, S stays as it was. Two are ours. The G of Adv-CSNet-E learned against",
        "several classifiers. The decoder of Adv-CSNet-S refines the CSNet's pictures, which wins PSNR, and spends",
        "that and some more on steps along gradients of readers that it carries, away from what one that learned to",
        "read refined pictures (its guide) says they show. What PSNR a model loses is held against the CSNet, not",
        "against refined pictures. Surrogates are classifiers that ours learned against or carry; judges are others.",
        "Which readers Adv-CSNet-S carries, and how much each ratio may cost, was chosen with what the judges read",
        "of some of these pictures in sight.",
        "",
        "A cell of the paper's own reads: ours (printed, difference). Recognition is the percentage of CIFAR-10's",
        "test pictures, in gray, that a classifier reads rightly (lower protects better). Chance is 10 %: a reader",
        "below it is led to other classes. Who knows to which maps its answers back, and one that is retrained on",
        "labelled veiled pictures (T4) reads most of them. PSNR in dB is the mean over the pictures; what a veil",
        "costs of it over the ratios is, as the paper has it, one minus the ratio of the mean PSNRs.",
        "",
    ]
    for name in SCHEDULES:
        lines += _schedule(name, paper["schedules"][name])
    lines += ["## Figures", ""]
    for figure in paper["figures"]:
        lines += [f"![{figure['title']}](paper/{figure['file']})", "", f"{figure['title']}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _schedule(name: str, told: Told) -> list[str]:
    lines = [f"## {_TITLES[name]}", ""]
    if not any(told.values()):
        return [*lines, f"Not run yet: `veilcam-train reproduce --schedule {name}`.", ""]
    for title, part in _PARTS:
        table = part(told, name)
        if table:
            lines += [f"### {title}", "", *table, ""]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    rule = "|".join(["---"] + ["--:"] * (len(head) - 1))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _beside(ours: float | None, theirs: float | None) -> str:
    if ours is None:
        return _DASH if theirs is None else f"{_DASH} ({theirs:.2f})"
    return f"{ours:.2f}" if theirs is None else f"{ours:.2f} ({theirs:.2f}, {ours - theirs:+.2f})"


def _model(told: Told, key: str, ratio: int) -> Told | None:
    found: Told | None = told["models"].get(f"{key}-r{ratio}")
    return found


def recognition(model: Told, reader: str, rendition: str = ITSELF, way: str = AS_IS) -> float | None:
    """Percent that a reader reads of a model's pictures, if it was measured."""
    found: float | None = model["recognition"].get(reader, {}).get(rendition, {}).get(way)
    return found


def mean_recognition(
    model: Told | None, readers: Sequence[str], rendition: str = ITSELF, way: str = AS_IS
) -> float | None:
    """Mean over readers, if all were measured."""
    if model is None:
        return None
    return _mean_of_all([recognition(model, reader, rendition, way) for reader in readers])


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """Their mean, if none of them is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def _rows_with_mean(
    told: Told, value: Callable[[Told, int], float | None], theirs: Callable[[str], printed.Row | None]
) -> list[list[str]]:
    rows = []
    for key, (title, printed_as) in MODELS.items():
        models = [_model(told, key, ratio) for ratio in RATIOS]
        if not any(models):
            continue
        ours = [value(model, ratio) if model else None for model, ratio in zip(models, RATIOS, strict=True)]
        row = theirs(printed_as) if printed_as else None
        cells = [_beside(o, row[k] if row else None) for k, o in enumerate(ours)]
        rows.append([title, *cells, _beside(_mean_of_all(ours), mean(row) if row else None)])
    return rows


_HEAD = ("model", *(f"r = {ratio / 100}" for ratio in RATIOS), "mean")


def _table1(told: Told, _: str) -> list[str]:
    rows = _rows_with_mean(told, lambda m, _: mean_recognition(m, tuple(PAPER)), printed.RECOGNITION.get)
    return _table(_HEAD, rows)


def _table2(told: Told, _: str) -> list[str]:
    rows = []
    for key, (title, printed_as) in MODELS.items():
        for reader in PAPER:
            models = [_model(told, key, ratio) for ratio in RATIOS]
            if not any(models):
                continue
            row = printed.GENERALISATION.get((printed_as or "", reader))
            ours = [recognition(model, reader) if model else None for model in models]
            rows.append([title, reader, *(_beside(o, row[k] if row else None) for k, o in enumerate(ours))])
    return _table((_HEAD[0], "classifier", *_HEAD[1:-1]), rows)


def _table3(told: Told, _: str) -> list[str]:
    return _table(_HEAD, _rows_with_mean(told, lambda m, _: float(m["psnr"][ITSELF]), printed.PSNR.get))


def lost(told: Told, key: str, ratios: Sequence[int]) -> float | None:
    """Percent of the CSNets' mean PSNR over some ratios that a model lost, if all of them were measured."""
    pairs = [(_model(told, key, ratio), _model(told, "csnet", ratio)) for ratio in ratios]
    found = [(float(m["psnr"][ITSELF]), float(p["psnr"][ITSELF])) for m, p in pairs if m and p]
    if len(found) < len(ratios):
        return None
    return _share_lost([fidelity for fidelity, _ in found], [plain for _, plain in found])


def _cost(told: Told, _: str) -> list[str]:
    rows = []
    plain = printed.PSNR["CSNet"]
    for key, (title, printed_as) in MODELS.items():
        ours = [lost(told, key, (ratio,)) for ratio in RATIOS]
        if key == "csnet" or all(value is None for value in ours):
            continue
        row = printed.PSNR.get(printed_as or "")
        theirs = [_share_lost([row[k]], [plain[k]]) if row else None for k in range(len(RATIOS))]
        whole = _share_lost(row, plain) if row else None
        cells = [_beside(o, t) for o, t in zip(ours, theirs, strict=True)]
        rows.append([title, *cells, _beside(lost(told, key, RATIOS), whole)])
    return _table(_HEAD, rows)


def _share_lost(fidelity: Sequence[float], plain: Sequence[float]) -> float:
    return 100 * (1 - mean(fidelity) / mean(plain))


def _judges(told: Told, _: str) -> list[str]:
    readers = _present(told, JUDGES)
    rows = []
    for name, title in _named(told):
        model = told["models"][name]
        cells = [_beside(recognition(model, reader), None) for reader in readers]
        rows.append([title, *cells, _beside(mean_recognition(model, readers), None)])
    return _table(("model", *readers, "mean"), rows) if readers else []


def mapped_back(told: Told, _: str) -> list[str]:
    """What readers make of pictures that are always led to the same wrong classes, where that was measured."""
    readers = _present(told, (*PAPER, *JUDGES))
    rows = []
    for name, title in _named(told):
        found = told["models"][name].get("mapped_back", {})
        cells = [found.get(reader) for reader in readers]
        if found:
            rows.append([title, *(_beside(cell, None) for cell in (*cells, _mean_of_all(cells)))])
    return _table(("model", *readers, "mean"), rows)


def ablation(told: Told, name: str, of: str = _ABLATED_E) -> list[str]:
    """Which part of a model gives what: some settings changed, in runs of its kind that are named so."""
    base = told["models"].get(of)
    if base is None:
        return []
    kind = base["run"]["kind"]
    runs = [run for run, model in told["models"].items() if run.startswith(_ABLATION) and model["run"]["kind"] == kind]
    runs = [run for run in runs if run != of]
    if not runs:
        return []
    readers = _present(told, (*PAPER, *JUDGES))
    rows = []
    for run in (of, *runs):
        model = told["models"][run]
        changes = _changed(model["run"], base["run"])
        guides = [told["retrained"].get(each["run"].get("guide")) for each in (model, base)]
        if all(guides):
            changes += [f"its {change}" for change in _changed(*(guide["run"] for guide in guides))]
        cost = lost(told, run.removesuffix("-r10"), (10,))
        read = [recognition(model, reader) for reader in readers]
        purified = [mean_recognition(model, readers, ITSELF, way) for way in PURIFIERS]
        cells = [_beside(cell, None) for cell in (cost, *read, *purified)]
        rows.append([_linked(run, name), ", ".join(changes) or "nothing", *cells])
    head = ("run", "changed", "PSNR lost, %", *readers, *(f"all after {way}" for way in PURIFIERS))
    told_of = f"{base['run']['iterations']} iterations of {base['run']['batch']} pictures each, r = 0.1."
    if (model := told["models"].get(_ABLATED[of])) and (changes := _changed(base["run"], model["run"])):
        told_of += f" The first run isn't {_ABLATED[of]} itself: {', '.join(changes)}."
    return [*_table(head, rows), "", told_of]


def _changed(run: Told, unchanged: Told) -> list[str]:
    """What settings of two runs of a kind differ in, as the first has it."""
    kind = KINDS[run["kind"]]
    then = settings_told(unchanged, kind)
    return [f"{key} = {_setting(v)}" for key, v in settings_told(run, kind).items() if v != then.get(key)]


def _setting(value: object) -> str:
    """On one line."""
    return (" + ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def _controls(told: Told, _: str) -> list[str]:
    rows = []
    readers = _present(told, (*PAPER, *JUDGES))
    for name, title in _named(told):
        model = told["models"][name]
        if NOISE not in model["psnr"]:
            continue
        cells = [_beside(mean_recognition(model, readers, rendition), None) for rendition in (ITSELF, NOISE, BLUR)]
        psnr = [f"{model['psnr'][rendition]:.2f}" for rendition in (ITSELF, NOISE, BLUR)]
        rows.append([title, *(f"{c} at {p} dB" for c, p in zip(cells, psnr, strict=True))])
    return _table(("model", "its pictures", "noise", "blur"), rows)


def _purified(told: Told, _: str) -> list[str]:
    rows = []
    for name, title in _named(told):
        model = told["models"][name]
        for group, readers in (("VGG-16, ResNet-110", tuple(PAPER)), ("judges", _present(told, JUDGES))):
            cells = [mean_recognition(model, readers, ITSELF, way) for way in (AS_IS, *PURIFIERS)]
            if readers and None not in cells[1:]:
                rows.append([title, group, *(_beside(cell, None) for cell in cells)])
        if "psnr_purified" in model:
            psnr = [model["psnr"][ITSELF], *(model["psnr_purified"][way] for way in PURIFIERS)]
            rows.append([title, "PSNR, dB", *(f"{value:.2f}" for value in psnr)])
    return _table(("model", "", AS_IS, *PURIFIERS), rows)


def _retrained(told: Told, _: str) -> list[str]:
    rows = []
    for name, title in _named(told):
        for cell_name, cell in told["retrained"].items():
            if cell["run"]["model"] != name:
                continue
            run = cell["run"]
            model = told["models"][name]
            known = all(model.get("needs", {}).get(each, of) == of for each, of in cell.get("needs", {}).items())
            before = recognition(model, run["reader"]) if known else None
            how = "from new weights" if run["scratch"] else "from its own weights"
            how += ", a guide" if _is_guide(cell_name, run) else ""
            rows.append(
                [title, run["reader"], how, _beside(before, None), _beside(cell["recognition"], None),
                 f"{cell['iterations']} of at most {run['iterations']}"]
            )  # fmt: skip
    return _table(("model", "reader", "retrained", "before", "after", "iterations"), rows)


def _mnist(told: Told, _: str) -> list[str]:
    rows = []
    for name, model in told["models"].items():
        if model["run"]["data"] == "mnist":
            readers = tuple(model["recognition"])
            read = [f"{reader}: {recognition(model, reader):.2f}" for reader in readers]
            controls = [_beside(mean_recognition(model, readers, control), None) for control in (NOISE, BLUR)]
            beta = [f"{model['run'][key]:g}" for key in ("beta", "beta_later") if key in model["run"]]
            psnr, ssim = f"{model['psnr'][ITSELF]:.2f}", f"{model['ssim'][ITSELF]:.4f}"
            rows.append([name, ", then ".join(beta) or _DASH, psnr, ssim, ", ".join(read) or _DASH, *controls])
    head = ("model", "β (the paper: 1, then 0.1)", "PSNR, dB", "SSIM", "recognition, %")
    return _table((*head, "noise at equal PSNR", "blur at equal PSNR"), rows)


def _classifiers(told: Told, name: str) -> list[str]:
    rows = []
    for reader, entry in told["classifiers"].items():
        network = entry["run"]["network"]
        part = "the paper's" if network in PAPER else "judge" if network in JUDGES else "surrogate"
        rows.append([_linked(reader, name), entry["run"]["data"], part, f"{entry['recognition']:.2f}"])
    again = f"Trained anew by `veilcam-train reproduce --schedule {name} --only NAME`; their weights aren't kept here."
    return [*_table(("classifier", "data", "part", "reads of the originals, %"), rows), "", again] if rows else []


def doubts(told: Told) -> list[str]:
    """What to hold against these figures, found by looking at them."""
    found = []
    for reader in (*PAPER, *JUDGES):
        entry = told["classifiers"].get(reader)
        if entry is None:
            found.append(f"{reader} wasn't trained, so no model was measured with it.")
        elif entry["recognition"] < _RELIABLE:
            found.append(
                f"{reader} reads {entry['recognition']:.2f} % of the originals, less than {_RELIABLE:.0f} %: "
                "what it misreads says less about the veil."
            )
    readers = _present(told, (*PAPER, *JUDGES))
    for name, title in _named(told):
        model = told["models"][name]
        own = mean_recognition(model, readers)
        for control in (NOISE, BLUR):
            theirs = mean_recognition(model, readers, control)
            if own is not None and theirs is not None and theirs <= own and not name.startswith("csnet"):
                found.append(f"{title}: {control} at equal PSNR leaves {theirs:.2f} %, no more than its {own:.2f} %.")
    found += [
        f"{run}: trained, but no classifier has read its pictures yet."
        for run, model in told["models"].items()
        if not model["recognition"]
    ]
    if below := [title for name, title in _named(told) if _below_chance(told["models"][name], readers)]:
        found.append(
            f"{'; '.join(below)}: a reader is below chance, and what it reads with its answers mapped back wasn't "
            "measured."
        )
    cells = {run: cell for run, cell in told["retrained"].items() if not _is_guide(run, cell["run"])}
    if cut := sum(cell["iterations"] >= cell["run"]["iterations"] for cell in cells.values()):
        found.append(
            f"{cut} of {len(cells)} retrained readers (T4) ended by their limit of iterations, not because they "
            "stopped getting better: retrained for longer they may read more."
        )
    by_changes: dict[str, list[str]] = {}
    for group in ("models", "classifiers", "retrained"):
        for run, entry in told[group].items():
            if entry.get("changed"):
                by_changes.setdefault(_changes(entry), []).append(run)
    found += [
        f"{', '.join(runs)}: trained before settings changed ({changes})." for changes, runs in by_changes.items()
    ]
    by_others: dict[str, list[str]] = {}
    for group in ("models", "retrained"):
        for run, entry in told[group].items():
            if entry.get("others"):
                by_others.setdefault(", ".join(entry["others"]), []).append(run)
    found += [
        f"{', '.join(runs)}: from an earlier report, made from or measured with other runs of {others} than the rest."
        for others, runs in by_others.items()
    ]
    return found


def _changes(entry: Told) -> str:
    """What its run file has otherwise now than when it was trained."""
    changed = entry.get("changed", {})
    return ", ".join(f"{key} was {_setting(then)}, is {_setting(now)}" for key, (then, now) in changed.items())


def _doubts(told: Told, _: str) -> list[str]:
    return [f"- {line}" for line in doubts(told)]


@dataclass(frozen=True)
class Target:
    """What was to be reached.

    Attributes:
        model: whose it is, by its title.
        what: in words.
        limit: to reach.
        at_most: ours must not be above it, else not below.
        ours: None if it wasn't measured.
    """

    model: str
    what: str
    limit: float
    at_most: bool
    ours: float | None

    @property
    def missed_by(self) -> float | None:
        """How far ours is on the wrong side of the limit, in hundredths; 0 if it is reached, None if not measured."""
        if self.ours is None:
            return None
        beyond = self.ours - self.limit if self.at_most else self.limit - self.ours
        return max(0.0, round(beyond, 2))


def targets(told: Told) -> list[Target]:
    """What was to be reached by our CSNet and our models."""
    plain = [_model(told, "csnet", ratio) for ratio in RATIOS]
    fidelity = [float(model["psnr"][ITSELF]) if model else None for model in plain]
    out = [
        Target("CSNet", f"PSNR at r = {ratio / 100}, dB (within 0.3 of the paper's)", theirs - 0.3, False, ours)
        for ratio, theirs, ours in zip(RATIOS, printed.PSNR["CSNet"], fidelity, strict=True)
    ]
    return out + [target for key in _OURS for target in _targets_of_model(told, key)]


def _targets_of_model(told: Told, key: str) -> list[Target]:
    models = [_model(told, key, ratio) for ratio in RATIOS]
    judges = _present(told, JUDGES) if len(_present(told, JUDGES)) == len(JUDGES) else ()

    def over_ratios(readers: Sequence[str], way: str = AS_IS) -> float | None:
        return _mean_of_all([mean_recognition(model, readers, ITSELF, way) for model in models])

    wanted = [
        ("VGG-16 and ResNet-110, mean over the ratios, %", 12.5, over_ratios(tuple(PAPER))),
        ("PSNR lost, %", 1.0, lost(told, key, RATIOS)),
        ("four judges that it never saw, %", 15.0, over_ratios(judges)),
    ]
    all_six = (*PAPER, *judges) if judges else ()
    wanted += [(f"all six after {way}, %", 25.0, over_ratios(all_six, way)) for way in PURIFIERS]
    name = printed.MODELS[key][0]
    return [Target(name, what, limit, True, ours) for what, limit, ours in wanted]


def _targets(told: Told, _: str) -> list[str]:
    rows, wanted = [], targets(told)
    measured = {target.model for target in wanted if target.ours is not None}
    for target in (target for target in wanted if target.model in measured):
        missed = target.missed_by
        reached = "not measured" if missed is None else "reached" if missed == 0 else f"missed by {missed:.2f}"
        asked = f"{'≤' if target.at_most else '≥'} {target.limit:.2f}"
        rows.append([f"{target.model}: {target.what}", asked, _beside(target.ours, None), reached])
    lines = _table(("what", "to reach", "ours", ""), rows)
    absent = dict.fromkeys(target.model for target in wanted if target.model not in measured)
    if absent:
        lines += [""] * bool(lines) + [f"Not measured, or not at every ratio: {'; '.join(absent)}."]
    return lines


def _below_chance(model: Told, readers: Iterable[str]) -> bool:
    """Far below it, by some reader whose answers weren't mapped back."""
    read = {reader: recognition(model, reader) for reader in readers if reader not in model.get("mapped_back", {})}
    return any(value is not None and value < 0.9 * _CHANCE for value in read.values())


def _sources(told: Told, name: str) -> list[str]:
    rows = []
    for group in ("models", "classifiers", "retrained"):
        for run, entry in told[group].items():
            trained, settings = entry["trained"], entry["run"]
            file = _linked(run, name, "measurement" if group == "retrained" and not _is_guide(run, settings) else None)
            schedule = [str(settings["iterations"]), str(settings["batch"])]
            where = f"{trained.get('device', trained['processor'])}, torch {trained['torch']}"
            measured = entry["measured"]["commit"] if group == "models" else ""
            rows.append([file, *schedule, trained["commit"], where, measured, f"[log](paper/{name}/{run}.csv)"])
    return _table(("run", "iterations", "batch", "by commit", "on", "measured by commit", "log"), rows)


def _is_guide(run: str, settings: Told) -> bool:
    """A retrained reader with a run file of its own, for decoders to go by."""
    return not run.startswith((f"{settings['reader']}-retrained-on-", f"{settings['reader']}-anew-on-"))


def _linked(run: str, schedule: str, file: str | None = None) -> str:
    return f"[{run}]({_RUN_FILES}/{schedule}/{file or run}.toml)"


def _present(told: Told, readers: Iterable[str]) -> tuple[str, ...]:
    return tuple(reader for reader in readers if reader in told["classifiers"])


def _named(told: Told) -> Iterator[tuple[str, str]]:
    """Models of CIFAR-10, the tables' own first; those of the ablation have a table of theirs."""
    titles = {
        f"{key}-r{ratio}": f"{title}, r = {ratio / 100}" for key, (title, _) in MODELS.items() for ratio in RATIOS
    }
    for name, model in told["models"].items():
        if name not in titles and model["run"]["data"] == "cifar10" and not name.startswith(_ABLATION):
            titles[name] = name
    yield from ((name, title) for name, title in titles.items() if name in told["models"])


_PARTS: Sequence[tuple[str, Callable[[Told, str], list[str]]]] = (
    ("What was to be reached", _targets),
    ("Doubts", _doubts),
    ("Table 1: recognition, mean of VGG-16 and ResNet-110, %", _table1),
    ("Table 2: recognition by each classifier, %", _table2),
    ("Table 3: PSNR, dB", _table3),
    ("PSNR lost against the CSNet of the same ratio, %", _cost),
    ("Judges that no model was trained against (T1), %", _judges),
    ("Each answer taken for the class that most often gets it, learned from half of the pictures, %", mapped_back),
    ("Adv-CSNet-E with some of its settings changed, recognition in %", ablation),
    ("Adv-CSNet-S with some of its settings changed, recognition in %", partial(ablation, of=_ABLATED_S)),
    ("Controls at equal PSNR: mean recognition of VGG-16, ResNet-110 and the judges, %", _controls),
    ("Purified on the way to the reader (T2), %", _purified),
    ("Readers retrained on a model's labelled pictures (T4), %", _retrained),
    ("MNIST", _mnist),
    ("Classifiers", _classifiers),
    ("Where each number comes from", _sources),
)
