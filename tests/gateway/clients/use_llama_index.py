"""llama-index: chat, stream, structured_predict."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, model = sys.argv[1:]


class City(BaseModel):
    """A city."""

    name: str
    inhabitants: int


llm = OpenAILike(
    model=model, api_base=f"{url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True, max_retries=0
)
found = llm.structured_predict(City, PromptTemplate("A city."))
assert (found.name, found.inhabitants) == ("Rome", 3), found
print("structured structured_predict")
assert llm.chat([ChatMessage(role="user", content="thirty")]).message.content == "It is 30 degrees."
assert "".join(part.delta or "" for part in llm.stream_chat([ChatMessage(role="user", content="thirty")])) == (
    "It is 30 degrees."
)
print("chat")
