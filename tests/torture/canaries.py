"""Code planted wherever a model, a data set, a template or the working folder could bring some; each leaves a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

MODULES = (
    *("modeling_gemma2.py", "configuration_gemma2.py", "tokenization_gemma2.py", "modeling_own.py", "__init__.py"),
    *("sitecustomize.py", "usercustomize.py", "conftest.py", "setup.py", "handler.py", "data.py", "custom_generate.py"),
    *("torch.py", "transformers.py", "tokenizers.py", "safetensors.py", "numpy.py", "yaml.py", "jinja2.py", "json.py"),
    *("generate.py", "rows.py", "a.py", "model.py"),
)
PICKLES = (
    *("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "training_args.bin", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "adapter_model.bin", "tokenizer.pkl", "vocab.pkl", "dataset.pkl", "state.pkl"),
)
TEMPLATE = (
    "{{% set x = {expression} %}}{{{{ bos_token }}}}{{% for m in messages %}}"
    "{{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}}"
    "{{{{ '<start_of_turn>' + role + '\\n' + m['content'] + '<end_of_turn>\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<start_of_turn>model\\n' }}}}{{% endif %}}"
)
EXPRESSIONS = (
    "''.__class__.__mro__[1].__subclasses__()",
    "cycler.__init__.__globals__.os.system('touch {canary}')",
    "lipsum.__globals__['os'].popen('touch {canary}').read()",
    "self.__init__.__globals__.__builtins__.open('{canary}', 'w')",
    "raise_exception.__globals__",
    "namespace.__init__.__globals__",
    "strftime_now.__globals__['datetime']",
    "('%s' | attr('format')).__self__.__class__",
    "'{{0.__class__.__init__.__globals__}}'.format(cycler)",
    "messages.__class__.__base__.__subclasses__()",
    "dict.__call__.__globals__",
    "joiner.__init__.__globals__.__builtins__['__import__']('os').system('touch {canary}')",
    "(messages | map(attribute='__class__.__base__') | list)",
    "range.__self__",
)
YAML_TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system ''",
    "!!python/module:canary_module ''",
    "!!python/object:canary_module.Canary {{}}",
    "!python/object/apply:subprocess.run [['touch', '{canary}']]",
)


class Canary:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


class Nest:
    """A folder for the files that canaries leave, and the number of those that were planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.planted = 0

    def new(self, name: str) -> Path:
        """Where the next canary leaves its file."""
        self.planted += 1
        return self.folder / f"{self.planted:03}-{name.replace('/', '_')}"

    def left(self) -> list[str]:
        """The canaries that ran."""
        return sorted(path.name for path in self.folder.iterdir())

    def code(self, name: str) -> str:
        """Python source that leaves a file when it is imported."""
        return f"open({str(self.new(name))!r}, 'w').close()\n"

    def plant(self, folder: Path, skipped: tuple[str, ...] = ()) -> None:
        """Put modules and pickles into a folder."""
        for name in MODULES:
            if name not in skipped and not (folder / name).exists():
                (folder / name).write_text(self.code(f"{folder.name}/{name}"))
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Canary(self.new(f"{folder.name}/{name}"))))

    def claim(self, model: Path) -> None:
        """Have the JSON files of a model ask for its code."""
        classes = {"AutoConfig": "configuration_gemma2.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        classes |= {"AutoTokenizer": ["tokenization_gemma2.Own", None]}
        for name in ("config.json", "tokenizer_config.json"):
            path = model / name
            path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))

    def templates(self) -> list[str]:
        """Chat templates that try to leave the sandbox."""
        filled = [text.format(canary=self.new("template")) for text in EXPRESSIONS]
        return [TEMPLATE.format(expression=text) for text in filled]

    def documents(self) -> list[str]:
        """YAML documents with tags that call code."""
        return [f"model: {tag.format(canary=self.new('yaml'))}\ndata: rows.jsonl\n" for tag in YAML_TAGS]

    def rows(self) -> str:
        """Rows that name code in the ways of pickles, templates and shells."""
        texts = [
            f"__import__('os').system('touch {self.new('row')}')",
            f"$(touch {self.new('row')})",
            f"`touch {self.new('row')}`",
            f"{{{{ lipsum.__globals__.os.system('touch {self.new('row')}') }}}}",
            f"!!python/object/apply:os.system ['touch {self.new('row')}']",
        ]
        rows = [{"prompt": text, "completion": text, "__reduce__": ["os.system", text]} for text in texts]
        rows += [
            {"prompt": "p", "completion": "c", "__class__": "os.system", "py/object": "os.system", "_target_": "os"}
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)
