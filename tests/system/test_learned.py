"""What a server learns about heads outlives it, and goes with the heads."""

from __future__ import annotations

from pathlib import Path

from lorastack.config import AdapterConfig
from lorastack.engine.speculator import WITHOUT_HEADS
from tests.helpers.live import PATIENCE, ROOMY, LiveServer, ask, wait_until
from tests.helpers.zoo import FAMILIAR, NARROW_HEADS, TRAINED_HEADS


def acceptance(server: LiveServer) -> dict[str, str]:
    """By heads digest. Read while no row runs."""
    return {d: known.to_json() for d, known in server.engine._speculator.calibrations.items()}


def generate(server: LiveServer, heads: str) -> None:
    for prompt in FAMILIAR:
        server.client.generate(ask(prompt, heads=heads, max_new_tokens=40, ignore_eos=True))
    server.assert_idle()


def serve(model: Path, folder: Path) -> LiveServer:
    return LiveServer(model, engine=ROOMY, adapters=AdapterConfig(store=folder / "store"))


def test_a_restart_forgets_nothing(tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]) -> None:
    names = (TRAINED_HEADS, NARROW_HEADS, "none")
    with serve(tiny_llama, tmp_path) as server:
        for name in names[:2]:
            server.upload(name, zoo[name])
            server.load_heads(name)
        for name in names:
            generate(server, name)
        known = acceptance(server)
        digest = server.digests[TRAINED_HEADS]
        worths = server.engine._speculator.calibrations[digest].mean_worths
    assert known.keys() == {*server.digests.values(), WITHOUT_HEADS}
    assert worths[0] > 0
    with serve(tiny_llama, tmp_path) as server:
        assert acceptance(server) == known
        assert server.engine._speculator.calibrations[digest].mean_worths == worths


def test_heads_that_are_deleted_are_forgotten(
    tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    with serve(tiny_llama, tmp_path) as server:
        server.upload(TRAINED_HEADS, zoo[TRAINED_HEADS])
        server.load_heads(TRAINED_HEADS)
        generate(server, TRAINED_HEADS)
        digest = server.digests[TRAINED_HEADS]
        assert digest in acceptance(server)
        server.client.delete_adapter(TRAINED_HEADS)
        wait_until(lambda: digest not in acceptance(server), "they are forgotten")
    with serve(tiny_llama, tmp_path) as server:
        assert digest not in acceptance(server)


def test_each_change_is_handed_over_once(
    tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    with serve(tiny_llama, tmp_path) as server:
        generate(server, "none")
        engine = server.engine
        first = engine.learned().result(PATIENCE)
        assert first.keys() == {WITHOUT_HEADS}
        assert engine.learned().result(PATIENCE) == {}
        before = first[WITHOUT_HEADS].to_json()
        generate(server, "none")
        assert first[WITHOUT_HEADS].to_json() == before  # a copy
        engine.close()
        (last,) = engine.learned().result(0).values()
        assert last.to_json() == acceptance(server)[WITHOUT_HEADS] != before
