"""instructor: tools, JSON and JSON schema."""

import sys

import instructor
import openai
from pydantic import BaseModel

url, model = sys.argv[1:]


class City(BaseModel):
    name: str
    inhabitants: int


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "A city."}],
        response_model=City,
        max_retries=0,
    )
    assert (found.name, found.inhabitants) == ("Rome", 3), (mode, found)
    print("structured", mode.value)
