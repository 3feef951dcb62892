"""The five tasks of the suite with a few rows each: as `--data` takes them, and in the columns of the hub's sets."""

import json
from random import Random

WORDS = "cat dog sun moon red blue seven nine tree river stone bird glass road north south warm cold"
SUBJECTS = ("abstract_algebra", "high_school_us_history")


class Miniature:
    """Rows by task, drawn from a seed; `rows` of each evaluated split. train: with splits for examples."""

    def __init__(self, rows=4, seed=3, train=True):
        self.random = Random(seed)
        self.ours, self.hub = {}, {}
        for task, split, source, shots in (
            ("mmlu", "test", "dev", 5),
            ("arc_challenge", "test", "train", 28),
            ("hellaswag", "validation", "train", 12),
            ("winogrande", "validation", "train", 7),
            ("gsm8k", "test", "train", 7),
        ):
            make = getattr(self, f"_{task}")
            groups = SUBJECTS if task == "mmlu" else ("",)
            sizes = [(source, shots)] if train else []
            sizes += [(split, rows if train else max(rows, shots + 2))]
            pairs = [make(name, group) for group in groups for name, count in sizes for _ in range(count)]
            self.ours[task] = [{"id": f"{task}-{number}", **ours} for number, (ours, _) in enumerate(pairs)]
            self.hub[task] = [hub for _, hub in pairs]

    def write(self, folder, **more):
        """TASK.jsonl for every task; `more` replaces the rows of some."""
        folder.mkdir(parents=True, exist_ok=True)
        for task, rows in (self.ours | more).items():
            (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def _words(self, least, most):
        return " ".join(self.random.choice(WORDS.split()) for _ in range(self.random.randint(least, most)))

    def _mmlu(self, split, subject):
        row = {"question": f" {self._words(4, 9)}? ", "choices": [self._words(1, 3) for _ in range(4)]}
        row |= {"answer": self.random.randrange(4), "subject": subject}
        return {"split": split, **row}, {"split": split, **row}

    def _arc_challenge(self, split, _):
        question, count = f"{self._words(3, 6)}?", self.random.choice((3, 4, 5))
        choices, answer = [self._words(1, 4) for _ in range(count)], self.random.randrange(count)
        labels = list("ABCDE")[:count]
        hub = {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[answer]}
        return {"split": split, "question": question, "choices": choices, "answer": answer}, {"split": split, **hub}

    def _hellaswag(self, split, _):
        start, end = f"[header] {self._words(3, 5)} [title] {self._words(2, 3)}.", self._words(1, 3)
        endings = [f"{self._words(3, 6)} [substeps] x  y." for _ in range(4)]
        answer = self.random.randrange(4)
        hub = {"activity_label": "Cooking", "ctx_a": start, "ctx_b": end, "endings": endings, "label": str(answer)}
        ours = {"context": f"Cooking: {start} {end.capitalize()}", "choices": endings, "answer": answer}
        return {"split": split, **ours}, {"split": split, **hub}

    def _winogrande(self, split, _):
        sentence, choices = (
            f"The {self._words(1, 3)} met _ because {self._words(2, 4)}.",
            [self._words(1, 2) for _ in "ab"],
        )
        answer = self.random.randrange(2)
        hub = {"sentence": sentence, "option1": choices[0], "option2": choices[1], "answer": str(answer + 1)}
        return {"split": split, "sentence": sentence, "choices": choices, "answer": answer}, {"split": split, **hub}

    def _gsm8k(self, split, _):
        a, b = self.random.randint(0, 40), self.random.randint(0, 40)
        row = {"question": f"How many is {a} + {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        return {"split": split, **row}, {"split": split, **row}
