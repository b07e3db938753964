// AI SDK (what OpenCode speaks through): generateObject, a stream, and a tool loop.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const petals = createOpenAICompatible({ name: "petals", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const model = petals(name);
const City = z.object({ name: z.string(), inhabitants: z.number() });

const { object } = await generateObject({ model, schema: City, prompt: "A city.", maxRetries: 0 });
assert.deepEqual(object, { name: "Rome", inhabitants: 3 });
console.log("structured generateObject");

const weather = tool({ description: "The weather.", inputSchema: City, execute: async () => "thirty" });
const looped = await generateText({
  model, tools: { weather }, stopWhen: stepCountIs(3), prompt: "How is the weather?", maxRetries: 0,
});
assert.equal(looped.text, "It is 30 degrees.");
assert.equal(looped.steps.length, 2);

const streamed = streamText({ model, tools: { weather }, stopWhen: stepCountIs(3), prompt: "Weather?", maxRetries: 0 });
let text = "";
for await (const part of streamed.textStream) text += part;
assert.equal(text, "It is 30 degrees.");
console.log("tools");
