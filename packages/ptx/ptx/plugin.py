"""A plugin of pytest: Triton's launches in a test run emulated, and findings fail the test.

    @pytest.mark.ptx(arch=90)          this test; further names are those of ptx.Options: seed=1, noise=1
    pytest --ptx-arch 90               all tests, and what modules launch at their import; tensors of "cuda" lie on the CPU
    def test(ptx_launches): ...        the test's launches so far, with counts

A conftest.py that has more to tell of the GPU that is not there implements `pytest_ptx_emulated` (see Hooks).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from ptx.architectures import ARCHITECTURES

if TYPE_CHECKING:  # torch and Triton are imported with the first test that asks for them
    from ptx.running.launch import Launch
    from ptx.running.reports import Options

DEFAULT = 90
LAUNCHES = pytest.StashKey["list[Launch]"]()


class Hooks:
    @pytest.hookspec(firstresult=True)
    def pytest_ptx_emulated(self, arch: int, options: Options) -> AbstractContextManager[list[Launch]] | None:
        """A context in which launches are emulated, and which gives their list. The plugin's is ptx.emulated(arch, options)."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


@pytest.hookimpl(trylast=True)
def pytest_ptx_emulated(arch: int, options: Options) -> AbstractContextManager[list[Launch]]:
    from ptx.calls import emulated

    return emulated(arch, options)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "Triton kernels on CPU tensors, emulated")
    text = "all tests run Triton's launches as this GPU would: sm_90 is 90"
    group.addoption("--ptx-arch", type=int, choices=ARCHITECTURES, help=text)
    group.addoption("--ptx-seed", type=int, default=0, help="draws the order of blocks and warps")
    text = "asks for no fences, which Triton before 3.8 leaves out"
    group.addoption("--ptx-without-fences", dest="ptx_fences", action="store_false", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ptx(arch=90, **options): Triton's launches in the test are emulated, as on this GPU")
    if config.option.ptx_arch is not None:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        if len(config.hook.pytest_ptx_emulated.get_hookimpls()) == 1:  # else a conftest.py tells of the GPU
            from ptx.cuda_tensors import on_cpu

            stack.enter_context(on_cpu(config.option.ptx_arch))
        config.stash[LAUNCHES] = stack.enter_context(_emulated(config))


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"ptx: Triton's launches are emulated, as on sm_{config.option.ptx_arch}" if LAUNCHES in config.stash else None


def _emulated(config: pytest.Config, arch: int | None = None, **options: Any) -> AbstractContextManager[list[Launch]]:
    from ptx.running.reports import Options

    options = {"seed": config.option.ptx_seed, "fences": config.option.ptx_fences} | options
    return config.hook.pytest_ptx_emulated(arch=arch or config.option.ptx_arch or DEFAULT, options=Options(**options))


@pytest.fixture(autouse=True)
def _ptx(request: pytest.FixtureRequest) -> Iterator[None]:
    node, config = request.node, request.config
    if marker := node.get_closest_marker("ptx"):
        arguments = {"arch": config.option.ptx_arch, **marker.kwargs}
        with _emulated(
            config, *marker.args, **{k: v for k, v in arguments.items() if k != "arch" or not marker.args}
        ) as launches:
            node.stash[LAUNCHES] = launches
            yield
        return
    if LAUNCHES in config.stash:
        from ptx.triton import reseed

        reseed()  # a test alone is what it is among others
        node.stash[LAUNCHES] = config.stash[LAUNCHES]
        node.stash[LAUNCHES].clear()
    yield


@pytest.fixture
def ptx_launches(request: pytest.FixtureRequest, _ptx: None) -> list[Launch]:
    """The launches of the test so far: counts, findings, shapes."""
    if LAUNCHES not in request.node.stash:
        pytest.fail("ptx_launches is for tests with @pytest.mark.ptx, or for pytest --ptx-arch 90", pytrace=False)
    return request.node.stash[LAUNCHES]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A launch with findings raises; a test that caught it fails all the same."""
    result = yield
    for launch in item.stash.get(LAUNCHES, []):
        launch.check()
    return result
