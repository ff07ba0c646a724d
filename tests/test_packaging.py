"""What is installed: packages, names, lazy imports, wheel, sdist; and what the documents say."""

import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import click
import pytest

import modernbert
from modernbert.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {
    "modernbert": "modernbert",
    "modernbert.kernels": "kernels",
    "modernbert.weights": "weights",
}


def in_fresh_python(code: str) -> str:
    """Output of a program run from a folder where our `kernels/` cannot be found by accident."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout


def source_files() -> dict[str, Path]:
    """Files of the packages by their path in a wheel."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}": path
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        # How the embedded checkpoint was made is for readers of the repository.
        if path.is_file() and not {"__pycache__", "recipe"} & set(path.parts)
    }


def test_every_folder_of_code_is_a_named_package() -> None:
    code = [name for name in source_files() if name.endswith(".py")]
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in code}
    assert set(SETUPTOOLS["packages"]) == folders
    assert SETUPTOOLS["package-dir"] == {k: v for k, v in FOLDERS.items() if k != v}


def test_import_takes_no_torch_and_little_time() -> None:
    code = "import sys, modernbert; print(sorted({'torch', 'numpy', 'click'} & sys.modules.keys()))"
    assert in_fresh_python(code).strip() == "[]"
    times = []
    for _ in range(3):
        code = "import time; t = time.perf_counter(); import modernbert"
        times.append(float(in_fresh_python(f"{code}; print(time.perf_counter() - t)")))
    assert min(times) < 0.2, times


def test_config_and_tokenizer_take_no_torch() -> None:
    code = (
        "import sys, modernbert; modernbert.ModernBertConfig; modernbert.Tokenizer; "
        "print('torch' in sys.modules)"
    )
    assert in_fresh_python(code).strip() == "False"


def test_public_names_resolve() -> None:
    for name in modernbert.__all__:
        assert getattr(modernbert, name).__name__ == name
    assert set(modernbert.__all__) <= set(dir(modernbert))
    with pytest.raises(AttributeError, match="module 'modernbert' has no attribute 'nothing'"):
        _ = modernbert.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from modernbert import nothing  # noqa: F401


def test_version_and_console_script() -> None:
    assert modernbert.__version__ == PROJECT["project"]["version"]
    assert metadata.version("modernbert") == modernbert.__version__
    [script] = metadata.entry_points(group="console_scripts", name="modernbert")
    assert script.load() is main
    assert Path(sys.executable).with_name("modernbert").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is made from it."""
    newest = tuple(int(part) for part in metadata.version("setuptools").split(".")[:1])
    if newest < (77,):
        pytest.skip("building needs setuptools 77 here, because it may not be downloaded")
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS.values(), "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    result = subprocess.run(
        [*command, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)],
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "dist"


def test_the_wheel_made_from_the_sdist_holds_every_file(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    assert wheel.name == f"modernbert-{modernbert.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    info = f"modernbert-{modernbert.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == set(source_files())
    assert "modernbert/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    about = (tmp_path / info / "METADATA").read_text("utf-8")
    assert "License-Expression: Apache-2.0" in about and "Requires-Python: >=3.10" in about
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", about, re.M))
    assert extras >= {"flash", "distill", "evaluate", "train", "bench", "test"}
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import modernbert.kernels.reference, modernbert.weights.remap, modernbert.cli\n"
        "print(modernbert.kernels.__file__, modernbert.weights.__file__, modernbert.cli.__file__)"
    )
    assert in_fresh_python(code).count(str(tmp_path)) == 3


def test_the_sdist_can_be_tested(built: Path, tmp_path: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(sdist, tmp_path, **safely)
    [folder] = tmp_path.iterdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "modernbert", "kernels", "weights"):
        assert (folder / name).exists(), name
    assert (folder / "tests" / Path(__file__).name).exists()


README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_names_what_exists() -> None:
    imports = re.findall(r"^from modernbert import (.+)$", README, re.M)
    names = {name.strip() for line in imports for name in line.split(",")}
    assert names and names <= set(modernbert.__all__)
    commands = re.findall(r"^modernbert ((?:[^\n]|(?<=\\)\n)+)", README, re.M)
    assert {command.split()[0] for command in commands} >= set(main.commands) - {"demo"}
    for command in commands:
        name, *words = command.replace("\\\n", " ").split()
        flags = {
            flag
            for parameter in main.commands[name].params
            if isinstance(parameter, click.Option)
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("-") and word != "-"} <= flags, command


def test_the_makefile_has_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets
    run = (ROOT / ".ci" / "run").read_text("utf-8")
    assert set(re.findall(r"^make ([a-z]+)", run, re.M)) == {"test", "lint"}


def test_documents_link_to_files_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / target).exists(), (document, target)
    for name in re.findall(r"test_\w+\.py", (ROOT / "SECURITY.md").read_text("utf-8")):
        assert (ROOT / "tests" / name).exists(), name


def test_time_is_not_lost_on_the_command_line() -> None:
    """`--help` answers at once: the heavy imports wait for the command that needs them."""
    command = [Path(sys.executable).with_name("modernbert"), "--help"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd="/")
    assert time.perf_counter() - start < 2
