// graphile-worker with its local queue, and completions in batches: https://worker.graphile.org/docs/performance

import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { concurrency, inGroups, peer, setting } from "./protocol.js";

// A log line per job is no part of the work.
const logger = new Logger(() => () => {});

await peer({
  async fill(jobs) {
    const utils = await makeWorkerUtils({ connectionString: setting("DATABASE_URL"), logger });
    await utils.migrate();
    await inGroups(jobs, 2000, (numbers) => utils.addJobs(numbers.map((number) => ({ identifier: "noop", payload: { number } }))));
    await utils.release();
  },
  async work() {
    const runner = await run({
      taskList: { noop: async () => {} },
      noHandleSignals: true,
      logger,
      preset: {
        worker: {
          connectionString: setting("DATABASE_URL"),
          concurrentJobs: concurrency(),
          maxPoolSize: Math.max(10, Math.min(concurrency() + 2, 20)),
          pollInterval: 100,
          localQueue: { size: Number(setting("LOCAL_QUEUE")) },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
          logger,
        },
      },
    });
    return () => runner.stop();
  },
});
