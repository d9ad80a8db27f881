// Calls functions of a program, inside the sandbox: `node harness_javascript.js`, beside `solution.js`.
// The twin of harness_python.py; see there. Undefined is null, Map is an object, NaN is equal to nothing.
"use strict";
const fs = require("fs");
const vm = require("vm");

const MAX_DEPTH = 200;

function encode(value, depth) {
  if (depth > MAX_DEPTH) throw new RangeError("nested too deeply");
  if (value === undefined || value === null) return null;
  switch (typeof value) {
    case "boolean":
    case "string":
      return value;
    case "number":
      return Number.isFinite(value) ? value : { $float: String(value) };
    case "bigint":
      return { $int: value.toString() };
    case "object":
      break;
    default:
      return { $other: typeof value };
  }
  if (Array.isArray(value)) return Array.from(value, (item) => encode(item, depth + 1));
  if (value instanceof Set) return { $set: Array.from(value, (item) => encode(item, depth + 1)) };
  const entries = value instanceof Map ? Array.from(value.entries()) : Object.entries(value);
  const pairs = entries.map(([key, item]) => [encode(key, depth + 1), encode(item, depth + 1)]);
  if (pairs.every(([key]) => typeof key === "string" && !key.startsWith("$"))) return Object.fromEntries(pairs);
  return { $dict: pairs };
}

function decode(value) {
  if (Array.isArray(value)) return value.map(decode);
  if (value !== null && typeof value === "object") {
    const keys = Object.keys(value);
    if (keys.length === 1) {
      if (keys[0] === "$tuple") return value.$tuple.map(decode);
      if (keys[0] === "$set") return new Set(value.$set.map(decode));
      if (keys[0] === "$dict") return new Map(value.$dict.map(([key, item]) => [decode(key), decode(item)]));
    }
    return Object.fromEntries(keys.map((key) => [key, decode(value[key])]));
  }
  return value;
}

function main() {
  const { parse, stringify } = JSON;
  const leave = process.reallyExit.bind(process);
  const write = fs.writeSync;
  const read = fs.readFileSync;
  const source = read("solution.js", "utf8");
  Object.assign(globalThis, { require, module: { exports: {} }, exports: {} });
  process.stdout.write = () => true;
  const put = (text) => {
    for (let bytes = Buffer.from(text); bytes.length > 0; ) bytes = bytes.subarray(write(1, bytes));
  };
  try {
    vm.runInThisContext(source, { filename: "solution.js" });
  } catch (error) {
    write(2, String(error).slice(0, 500));
    leave(1);
  }
  for (const line of read(0, "utf8").split("\n")) {
    if (line === "") continue;
    const test = parse(line);
    let record;
    if (!("function" in test)) {
      record = { loaded: true };
    } else {
      try {
        const [owner, method] = test.function.split(".");
        const found = vm.runInThisContext(method === undefined ? owner : `new ${owner}()`);
        const args = test.args.map(decode);
        record = { returned: encode(method === undefined ? found(...args) : found[method](...args), 0) };
      } catch (error) {
        record = { raised: String(error && error.name).slice(0, 80) };
      }
    }
    put(test.nonce + " " + stringify(record) + "\n");
  }
  leave(0);
}

main();
