// Texts to token ids with the model's own tokenizer.

import { json } from "./files.js";

/** A function from a text to {input_ids, attention_mask, token_type_ids}, each {type, data, dims}. */
export async function loadTokens(options, url) {
  const { Tokenizer } = await import(new URL(options.library, url));
  const [tokenizer, config] = await Promise.all(
    [options.tokenizer, options.config].map((file) => json(new URL(file, url))),
  );
  const made = new Tokenizer(tokenizer, config);
  return async (text) => {
    let { ids } = made.encode(text);
    // What ends a text stays, as it does on the Python side.
    if (ids.length > options.max_length) ids = [...ids.slice(0, options.max_length - 1), ids.at(-1)];
    const tensor = (values) => ({
      type: "int64",
      data: BigInt64Array.from(values, BigInt),
      dims: [1, values.length],
    });
    return {
      input_ids: tensor(ids),
      attention_mask: tensor(ids.map(() => 1)),
      token_type_ids: tensor(ids.map(() => 0)),
    };
  };
}
