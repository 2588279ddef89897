import httpx
from server.harness import serving
from server.fake_text import answer, BOS
def test_smoke():
    with serving() as server:
        r = httpx.post(server.url + "/v1/chat/completions", json={"messages":[{"role":"user","content":"hi"}], "max_tokens": 5})
        print(r.text)
        assert r.json()["choices"][0]["message"]["content"] == answer([BOS, *b"user: hi\nassistant:"], 5)
        r = httpx.post(server.url + "/v1/chat/completions", json={"messages":[{"role":"user","content":"hi"}], "max_tokens": 5, "stream": True})
        print(r.text)
        r = httpx.get(server.url + "/metrics")
        print(r.text[:3000])
        server.assert_idle()
