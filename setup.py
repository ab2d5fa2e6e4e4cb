"""What pyproject.toml cannot say: a wheel holds the files of the repository that the commands read.

`defectcam.paths.repository_file` finds them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("function.yaml", "docs/sample.jpg")


class BuildWithFiles(build_py):
    def run(self):
        super().run()
        for name in () if self.editable_mode else FILES:
            target = Path(self.build_lib, "defectcam", name)
            self.mkpath(str(target.parent))
            self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildWithFiles})
