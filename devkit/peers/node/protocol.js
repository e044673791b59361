// How the harness drives a peer: `node PEER.js fill JOBS` inserts no-op jobs; `node PEER.js work` prints `ready`, begins when a line
// comes on standard input, and ends when standard input does. Settings come from the environment.

import { createInterface } from "node:readline";

export const setting = (name) => {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
};

export const concurrency = () => Number(setting("CONCURRENCY"));

/** Runs `fill(jobs)` or, once told to, `work()`, which returns how to stop it. */
export async function peer({ fill, prepare = async () => {}, work }) {
  const [command, jobs] = process.argv.slice(2);
  if (command === "fill") {
    await fill(Number(jobs));
    process.exit(0);
  }
  if (command !== "work") throw new Error("usage: fill JOBS | work");
  await prepare();
  const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
  console.log("ready");
  if (!(await lines.next()).done) {
    const stop = await work();
    while (!(await lines.next()).done);
    // The harness has what it wants; a peer that does not stop is not waited for.
    setTimeout(() => process.exit(0), 5000).unref();
    await stop();
  }
  process.exit(0);
}

/** Calls `insert` with the numbers of all jobs, so many at a time. */
export async function inGroups(jobs, size, insert) {
  for (let first = 0; first < jobs; first += size) {
    await insert(Array.from({ length: Math.min(size, jobs - first) }, (_, n) => first + n));
  }
}
