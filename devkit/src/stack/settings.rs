//! The settings of the local stack, and the environment of each of its processes.

use clap::Args;

use super::{API_KEY, WEBHOOK_SECRET};

/// The settings of `devkit up`. Every setting of `api`, `worker` and `devkit upstream` is passed on as well.
#[derive(Args, Clone, Debug)]
pub(crate) struct StackArgs {
    /// Port of the API.
    #[arg(long, env = "API_PORT", default_value_t = 8000)]
    pub(super) api_port: u16,
    /// Port of the worker's health and metrics.
    #[arg(long, env = "WORKER_PORT", default_value_t = 8001)]
    pub(super) worker_port: u16,
    /// Port of the simulated upstream.
    #[arg(long, env = "UPSTREAM_PORT", default_value_t = 9000)]
    pub(super) upstream_port: u16,
    /// Port of Postgres.
    #[arg(long, env = "POSTGRES_PORT", default_value_t = 54329)]
    pub(super) postgres_port: u16,
    /// How many times faster than in the challenge the upstream's time runs; 10: 10 calls in 6 s, outages of 6 s to 30 s.
    #[arg(long, env = "SPEED", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(super) speed: u32,
    /// Anything: the true speed, 10 calls in 60 s and outages of 60 s to 300 s.
    #[arg(long, env = "REAL_TIME", default_value = "", hide_default_value = true)]
    pub(super) real_time: String,
}

/// The environment variables of one process: fixed ones, and defaults for those that the developer has not set.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Environment {
    pub(super) fixed: Vec<(&'static str, String)>,
    pub(super) defaults: Vec<(&'static str, String)>,
}

impl StackArgs {
    /// Converts seconds of the challenge to milliseconds at the chosen speed.
    fn scaled(&self, seconds: u32) -> u32 {
        let speed = if self.real_time.is_empty() { self.speed } else { 1 };
        seconds * 1000 / speed
    }

    fn rate(&self) -> (&'static str, String) {
        ("UPSTREAM_RATE", format!("10/{}ms", self.scaled(60)))
    }

    /// Each port, what it is for, and the variable that changes it.
    pub(super) fn ports(&self) -> [(u16, &'static str, &'static str); 4] {
        [
            (self.api_port, "the API", "API_PORT"),
            (self.worker_port, "the worker", "WORKER_PORT"),
            (self.upstream_port, "the simulated upstream", "UPSTREAM_PORT"),
            (self.postgres_port, "Postgres", "POSTGRES_PORT"),
        ]
    }

    pub(super) fn upstream(&self) -> Environment {
        Environment {
            fixed: vec![("UPSTREAM_LISTEN", local(self.upstream_port))],
            defaults: vec![self.rate(), ("OUTAGE", format!("{}ms..{}ms", self.scaled(60), self.scaled(300)))],
        }
    }

    pub(super) fn api(&self, database: &str) -> Environment {
        Environment {
            fixed: vec![
                ("DATABASE_URL", database.to_owned()),
                ("API_LISTEN", local(self.api_port)),
                ("BOOTSTRAP_API_KEY", api_key()),
                ("BOOTSTRAP_WEBHOOK_SECRET", webhook_secret()),
            ],
            defaults: vec![("WEBHOOK_ALLOW_NETWORKS", LOCAL_NETWORKS.to_owned())],
        }
    }

    pub(super) fn worker(&self, database: &str) -> Environment {
        Environment {
            fixed: vec![
                ("DATABASE_URL", database.to_owned()),
                ("WORKER_LISTEN", local(self.worker_port)),
                ("UPSTREAM_URL", format!("http://{}", local(self.upstream_port))),
            ],
            defaults: vec![
                self.rate(),
                ("UPSTREAM_API_KEY", "upstream-key".to_owned()),
                ("WEBHOOK_ALLOW_NETWORKS", LOCAL_NETWORKS.to_owned()),
            ],
        }
    }
}

/// The networks of receivers on this machine.
const LOCAL_NETWORKS: &str = "127.0.0.0/8,::1/128";

/// The API key that exists from the start: the developer's, or the default.
pub(super) fn api_key() -> String {
    set("BOOTSTRAP_API_KEY").unwrap_or_else(|| API_KEY.to_owned())
}

/// The webhook secret of that key.
pub(super) fn webhook_secret() -> String {
    set("BOOTSTRAP_WEBHOOK_SECRET").unwrap_or_else(|| WEBHOOK_SECRET.to_owned())
}

/// The value of a variable; `None` if it is unset or empty.
pub(super) fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A loopback address, which no other machine can reach.
pub(super) fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Rate;

    fn args(speed: u32, real_time: &str) -> StackArgs {
        StackArgs { api_port: 1, worker_port: 2, upstream_port: 3, postgres_port: 4, speed, real_time: real_time.to_owned() }
    }

    #[test]
    fn the_worker_and_the_upstream_agree_on_the_rate_at_every_speed() {
        for (args, rate, outage) in [
            (args(10, ""), "10/6s", "6000ms..30000ms"),
            (args(10, "1"), "10/60s", "60000ms..300000ms"),
            (args(60, ""), "10/1s", "1000ms..5000ms"),
        ] {
            let (upstream, worker) = (args.upstream(), args.worker("postgres://x"));
            assert_eq!(upstream.defaults[0], worker.defaults[0]);
            assert_eq!(upstream.defaults[0].1.parse::<Rate>().unwrap(), rate.parse().unwrap());
            assert_eq!(upstream.defaults[1].1, outage);
        }
    }

    #[test]
    fn the_known_webhook_secret_is_a_valid_one() {
        assert!(standardwebhooks::Webhook::new(WEBHOOK_SECRET).is_ok());
    }
}
