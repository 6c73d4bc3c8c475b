"""FAULTS.md S13 and S14 in the server: what fails alone fails alone; memory may run out."""

import threading

import pytest
import torch

from tests.serve import tiny

TEXTS = ["the cat sat", "the old house in the", "don't they know", "on the mat, green"]


def together(served, bodies: list[dict]) -> list:
    """Answers of requests that are in flight at the same time."""
    answers: list = [None] * len(bodies)

    def ask(i):
        answers[i] = served.post("/v1/completions", **bodies[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


@pytest.fixture
def bodies():
    return [{"prompt": t, "max_tokens": 40, "temperature": 0} for t in TEXTS]


def test_s13_a_fault_in_one_rows_step_is_that_rows_alone(folder, bodies, monkeypatch):
    from retort.decode import stopping

    with tiny.in_process(folder) as served:
        expected = [served.complete(**b)["choices"][0]["text"] for b in bodies]
        ends = stopping._ends

        def faulty(request, token):
            if request.params.seed == 666 and len(request.output) > 10:
                raise RuntimeError("a fault in /secret/place.py")
            return ends(request, token)

        monkeypatch.setattr(stopping, "_ends", faulty)
        answers = together(served, [{**bodies[0], "seed": 666}, *bodies])
        assert answers[0].status_code == 500 and "secret" not in answers[0].text
        assert answers[0].json()["error"]["type"] == "server_error"
        assert [a.json()["choices"][0]["text"] for a in answers[1:]] == expected
        events = tiny.events(
            served.post("/v1/completions", **bodies[0], seed=666, stream=True).text
        )
        assert events[0]["choices"] and events[-1]["error"]["code"] == "engine"
        assert served.metric("request_success", finished_reason="error") == 2
        served.wait_idle()
        assert served.engine.target.cache.rows == ()


def test_s13_a_row_that_the_model_cannot_process(folder, bodies, monkeypatch):
    with tiny.in_process(folder) as served:
        expected = [served.complete(**b)["choices"][0]["text"] for b in bodies]
        model = served.engine.model
        forward, poison = type(model).forward, model.config.vocab_size - 1

        def faulty(self, input_ids=None, **more):
            if (input_ids == poison).any():
                raise RuntimeError("poison")
            return forward(self, input_ids=input_ids, **more)

        monkeypatch.setattr(type(model), "forward", faulty)
        answers = together(served, [{"prompt": [5, poison, 6], "max_tokens": 5}, *bodies])
        assert answers[0].status_code == 500
        assert [a.json()["choices"][0]["text"] for a in answers[1:]] == expected
        served.wait_idle()


@pytest.mark.parametrize("room", [2, 9])
def test_s14_out_of_memory_costs_speed_and_no_request(folder, bodies, monkeypatch, room):
    with tiny.in_process(folder) as served:
        expected = [served.complete(**b)["choices"][0]["text"] for b in bodies]
        model = served.engine.model
        forward = type(model).forward

        def small(self, input_ids=None, **more):
            if input_ids.shape[1] > room:
                raise torch.OutOfMemoryError("out of memory")
            return forward(self, input_ids=input_ids, **more)

        monkeypatch.setattr(type(model), "forward", small)
        answers = together(served, bodies)
        assert [a.json()["choices"][0]["text"] for a in answers] == expected


def test_a_step_that_nothing_can_save_ends_its_requests_and_not_the_server(folder, bodies):
    with tiny.in_process(folder) as served:
        expected = served.complete(**bodies[0])["choices"]
        step = served.engine.step

        def broken():
            raise RuntimeError("all is lost")

        served.engine.step = broken
        assert [a.status_code for a in together(served, bodies)] == [500] * 4
        served.engine.step = step
        assert served.complete(**bodies[0])["choices"] == expected
        assert served.http.get("/health").status_code == 200
