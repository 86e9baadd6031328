from tests.serve.local_server import LocalServer


def test_the_model_is_listed_with_what_it_can_do(server: LocalServer) -> None:
    models = server.client.get("/v1/models").json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "pyramid-serve")
    assert model["sizes"] == ["128x64", "64x64"]
    assert model["max_num_frames"] == 121
    assert server.client.get("/v1/models/tiny").json() == model
