// Asks a GGUF file some prompts in llama.cpp, greedily; `llama_cpp.py` calls this.
//
//     echo '{"model": "model.gguf", "prompts": ["Paris is in"]}' | node llama_cpp.mjs FOLDER
//
// FOLDER is where `npm i --ignore-scripts node-llama-cpp@3` was run. It holds llama.cpp, built.
// Reads one JSON object from standard input: model, adapter (or null), prompts, max_tokens, threads.
// Prints one: {"answers": [...], "tokens": [[...], ...]}, the tokens being those of the prompts.

import {readFileSync} from "node:fs";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const library = join(resolve(process.argv[2]), "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);
const task = JSON.parse(readFileSync(0, "utf8"));
const threads = task.threads ?? 2;

const llama = await getLlama({
    build: "never", gpu: false, maxThreads: threads, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath: task.model, gpuLayers: 0});
const context = await model.createContext({
    contextSize: 512,
    threads,
    sequences: 2,
    ...(task.adapter ? {lora: {adapters: [{filePath: task.adapter, scale: 1}]}} : {})
});
const sequence = context.getSequence();

const answers = [], tokens = [];
for (const prompt of task.prompts) {
    const ids = model.tokenize(prompt, true);
    if (model.tokens.shouldPrependBosToken && model.tokens.bos != null && ids[0] !== model.tokens.bos)
        ids.unshift(model.tokens.bos);
    const answer = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
        if (model.isEogToken(token)) break;
        answer.push(token);
        if (answer.length >= (task.max_tokens ?? 12)) break;
    }
    answers.push(model.detokenize(answer));
    tokens.push(ids);
}
process.stdout.write(JSON.stringify({answers, tokens}) + "\n", () => process.exit(0));
