"""Virtual machines: the image's modules put into the very kernel that they are for, once per kernel build."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from builds import kernel_image, loading
from builds.cache import scratch
from builds.errors import BuildError, HarnessError, InfrastructureError
from builds.kernel_image import KernelImage
from builds.loading import Answer
from builds.model import MODULES, ModuleType
from builds.plan import ModuleSet

from .evidence import Found, InSet, ModuleRef

NO_ANSWER = "no answer: the image lacks it, or the kernel had ended before"


@dataclass
class Guests:
    """What each kernel said to the image's modules."""

    found: Found
    _answers: dict[str, dict[str, Answer] | HarnessError] = field(default_factory=dict)

    def answer(self, of: InSet, step: str) -> Answer | None:
        """What came of a step; None for one that was not come to.

        Skips the check where there can be no such machine. Raises InfrastructureError where there was one and it did
        not do its work: that proves nothing.
        """
        subject, name = self.found.expected.subject, of.set.id
        if name not in subject.prepared:
            pytest.skip(subject.unprepared.get(name, "nothing is prepared for it"))
        if name not in self._answers:
            try:
                self._answers[name] = self._boot(of.set)
            except HarnessError as error:
                self._answers[name] = error
        answers = self._answers[name]
        if isinstance(answers, HarnessError):
            raise answers
        return answers.get(step)

    def _boot(self, of: ModuleSet) -> dict[str, Answer]:
        subject = self.found.expected.subject
        folder, guest = subject.prepared[of.id]
        kernel = KernelImage(folder)
        modules = {kind: self._modules(of, kind) for kind in of.modules}
        session = loading.session(
            {kind: {name: data for name, (data, _) in found.items()} for kind, found in modules.items()},
            guest,
            kernel.closure(name for found in modules.values() for _, needs in found.values() for name in needs),
            modversions=of.kernel.build.modversions,
        )
        with scratch(subject.scratch) as place:
            answers = loading.boot(
                subject.plan.cell.arch, kernel.vmlinuz, session, place, subject.logs / f"load-{of.id}.log"
            )
        said = " ".join(answers["kernel"].text).split()
        if not {of.kernel.build.release, of.kernel.build.package} <= set(said):
            raise InfrastructureError(
                "virtual machine",
                f"its kernel is not {of.kernel.build.release} ({of.kernel.build.package})",
                got=" ".join(said)[:200],
                hint=f"it came from: {kernel.source}",
            )
        own = answers.get("nvswitch")
        if own is None or own.errno:
            raise InfrastructureError(
                "virtual machine",
                "the guest's own module does not load",
                got="; ".join(own.kernel) if own else "no answer",
            )
        return answers

    def _modules(self, of: ModuleSet, kind: ModuleType) -> dict[str, tuple[bytes, list[str]]]:
        """The modules of a type as the image has them, and what they need; those that it lacks are left out."""
        modules = {}
        for name in MODULES:
            ref = ModuleRef(of, kind, name)
            try:
                data = self.found.file(ref.path).read()
            except BuildError:
                continue
            try:
                needs = kernel_image.depends(self.found.module(ref))
            except BuildError:
                needs = []
            modules[name] = (data, needs)
        return modules
