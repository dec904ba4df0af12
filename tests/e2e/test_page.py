"""The page as a part of a whole node: started, asked, killed, started again, stopped."""

import httpx2 as httpx

from tests.e2e.conftest import eventually, free_port, running_node


def test_the_page_is_a_part_of_the_node(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def device() -> dict:
        tiles = httpx.get(f"{url}/live.json", trust_env=False).json()["health"]
        return next(tile for tile in tiles if tile["name"] == "Device")

    with running_node(tmp_path, more_settings=f"[web]\nenabled = true\nport = {port}") as node:
        eventually(ready, "the node is ready")
        eventually(lambda: device()["said"].startswith("cpu"), "the worker says on what it works")
        assert device()["fine"]
        (page,) = (p for p in node.supervisor.children() if "web" in p.cmdline())
        node.kill_processes([page])
        eventually(ready, "the page is there again")
        assert httpx.get(f"{url}/api/v1/series", trust_env=False).json()["series"] == []
