"""pydantic-ai: its three kinds of output, and a tool loop."""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider

url, name = sys.argv[1:]


class City(BaseModel):
    name: str
    inhabitants: int


model = OpenAIChatModel(
    name,
    provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"),
    profile=OpenAIModelProfile(supports_json_schema_output=True, supports_json_object_output=True),
)
for kind in (ToolOutput, NativeOutput, PromptedOutput):
    found = Agent(model, output_type=kind(City), retries=0).run_sync("A city.").output
    assert found == City(name="Rome", inhabitants=3), (kind, found)
    print("structured", kind.__name__)

agent = Agent(model, retries=0)


@agent.tool_plain
def weather(name: str, inhabitants: int) -> str:
    """The weather of a city."""
    return "thirty"


assert agent.run_sync("How is the weather?").output == "It is 30 degrees."
print("tools")
