"""Secrets that are planted where a user has them, and a search for them in every byte that was written.

A secret counts as found in any of its forms: as it is, backwards, URL-encoded, as JSON escapes it, in hex, in base64 at
each of the three alignments that it can have inside of a longer text. Files that are gzip or zip are searched unpacked.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

# By the place where it is planted. The signs in them differ between the forms.
SECRETS = {
    "HF_TOKEN": "hf_Pl4nted/aB+cD=f7Q1",
    "HUGGING_FACE_HUB_TOKEN": "hf_Pl4nted/oLd+tK=n2W",
    "OPENAI_API_KEY": "sk-Pl4nted/xY+zW=k9R2",
    "JUDGE_KEY": "sk-Pl4nted/jU+dG=e5T3",
    "WANDB_API_KEY": "wb-Pl4nted/qE+rT=y3U4",
    "AWS_SECRET_ACCESS_KEY": "aws-Pl4nted/vB+nM=l8I5",
    "GITHUB_TOKEN": "ghp-Pl4nted/uI+oP=a1O6",
    "RAY_AUTH_TOKEN": "ray-Pl4nted/sD+fG=h6P7",
    "git remote": "Pl4ntedGitRemote-jK-lZ-x4A8",
    "proxy": "Pl4ntedProxy-mN-bV-c2S9",
    "user of an address": "Pl4ntedUser-qW-eR-t7D0",
    "query of an address": "Pl4ntedQuery-aS-dF-g5F1",
    "path of an address": "sk-Pl4ntedPath-hJ-kL-m3G2",
    "fragment of an address": "Pl4ntedFragment-zX-cV-b8H3",
    "--set": "sk-Pl4ntedSet-yU-iO-p1J4",
    "a recipe": "sk-Pl4ntedRecipe-rE-wQ-t9K5",
}
ENVIRONMENT = [name for name in SECRETS if name.isupper()]


def environment() -> dict[str, str]:
    """The variables that hold secrets, and those that name servers with one inside."""
    return {
        **{name: SECRETS[name] for name in ENVIRONMENT},
        "HF_ENDPOINT": f"http://me:{SECRETS['user of an address']}@127.0.0.1:9/hub",
        "ALL_PROXY": f"http://me:{SECRETS['proxy']}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://me:{SECRETS['proxy']}@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "GEMMA2_ALLOW_KEYS": "JUDGE_KEY",
    }


def forms(secret: str) -> set[bytes]:
    """The bytes by which a secret can be recognised."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), quote_plus(secret).encode(), raw.hex().encode(), raw[::-1]}
    found |= {json.dumps(secret).strip('"').replace("/", "\\/").encode()}
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + raw).rstrip(b"=")
        first = (0, 2, 3)[shift]  # characters that hold bits of what is before
        inner = text[first:-1]  # the last one may hold bits of what is behind
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


FORMS = {place: forms(secret) for place, secret in SECRETS.items()}


def found_in(content: bytes, depth: int = 0) -> Iterator[str]:
    """The places of the secrets that some bytes hold, in whatever form."""
    for place, texts in FORMS.items():
        if any(text in content for text in texts):
            yield place
    if depth > 3:
        return
    if content[:2] == b"\x1f\x8b":
        yield from found_in(gzip.decompress(content), depth + 1)
    elif content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from found_in(archive.read(name), depth + 1)


def search(folder: Path) -> tuple[list[str], int, int]:
    """(`FILE: PLACE` for each secret that a file below a folder or its name holds, files, bytes)."""
    found, files, size = [], 0, 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        content = path.read_bytes() if path.is_file() else b""
        files, size = files + path.is_file(), size + len(content)
        found += [f"{name}: {place}" for place in {*found_in(content), *found_in(name.encode())}]
    return found, files, size
