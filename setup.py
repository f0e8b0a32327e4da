"""Package metadata comes from settings.ini; edit that file, not this one."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
extras = {
    key.removesuffix("_requirements"): value.split()
    for key, value in cfg.items()
    if key.endswith("_requirements")
}  # `leaderboard` scores trained models, so it takes train along
extras["leaderboard"] = [*extras["train"], *extras["leaderboard"]]
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={
        "Documentation": f"https://{cfg['user']}.github.io/{cfg['repo']}/",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    # dataset/ stays a readable top-level folder here and travels inside the package
    packages=[*find_packages(include=[f"{lib}*"]), f"{lib}._dataset"],
    package_dir={lib: lib, f"{lib}._dataset": "dataset"},
    package_data={
        lib: ["py.typed"],
        f"{lib}.report": ["*.html", "*.css", "*.js"],
        f"{lib}.extras": ["card.md"],
        f"{lib}.scale": ["fsdp.yaml"],
        f"{lib}._dataset": ["*"],
    },
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
