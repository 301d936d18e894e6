"""Ways in which files change under a run."""

import os
import shutil

UNREAD = ("events.", ".tmp", "_CHECKPOINT_METADATA")  # logs and times, which nothing reads


def halved(content):
    return content[: len(content) // 2]


def cut_at_a_line(content):
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: (len(lines) + 1) // 2]) if len(lines) > 1 else None


def flipped(content):
    """A digit where there is one: what is most likely to be read as something else."""
    at = [i for i, byte in enumerate(content) if byte in b"012345678"]
    at = at[len(at) // 2] if at else len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if content else None


DAMAGES = {
    "half": halved,
    "line": cut_at_a_line,
    "empty": lambda content: b"" if content else None,
    "flip": flipped,
    "text": lambda content: b"hello, world\n",
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "gone": None,
}


def damage(path, name):
    """Damages a file. Returns whether it differs now."""
    if name == "gone":
        path.unlink()
        return True
    content = path.read_bytes()
    changed = DAMAGES[name](content)
    if changed is None or changed == content:
        return False
    path.write_bytes(changed)
    return True


def files_of(workdir):
    """All files, but of the images a few."""
    found = [p for p in sorted(workdir.rglob("*")) if p.is_file() and not any(x in p.name for x in UNREAD)]
    images = [p for p in found if p.parent.name == "images"]
    return [p for p in found if p not in images or p in images[::8]]


def each(workdir, copy, wanted=lambda path: True, names=tuple(DAMAGES)):
    """Yields (file, damage) for a fresh copy each."""
    for path in files_of(workdir):
        inside = path.relative_to(workdir)
        for name in names if wanted(inside) else ():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(workdir, copy, copy_function=os.link)
            target = copy / inside
            content = target.read_bytes()
            target.unlink()  # the copy shares its content with the original
            target.write_bytes(content)
            if damage(target, name):
                yield target, name
