"""LangChain: structured output in its three ways, and a tool loop."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]


class City(BaseModel):
    name: str
    inhabitants: int


@tool
def weather(name: str, inhabitants: int) -> str:
    """The weather of a city."""
    return "thirty"


chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_retries=0)
for method in ("function_calling", "json_mode", "json_schema"):
    found = chat.with_structured_output(City, method=method).invoke("A city as JSON, please.")
    assert found == City(name="Rome", inhabitants=3), (method, found)
    print("structured", method)
messages = [HumanMessage("How is the weather?")]
answer = chat.bind_tools([weather]).invoke(messages)
assert answer.tool_calls[0]["name"] == "weather", answer
messages += [answer, ToolMessage("thirty", tool_call_id=answer.tool_calls[0]["id"])]
assert chat.bind_tools([weather]).invoke(messages).content == "It is 30 degrees."
assert "".join(str(part.content) for part in chat.stream("thirty")) == "It is 30 degrees."
print("tools")
