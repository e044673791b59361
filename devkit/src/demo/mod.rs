//! `devkit demo`: sends the challenge's burst of 60 messages to a running stack, and shows the outcome of every one.
//!
//! - `burst` posts the messages and follows each to its signature; `progress` shows the progress; `report` judges and prints the outcome.
//!
//! It talks to the stack over HTTP only, so it works with Docker Compose and with a deployment as well as with `devkit up`.

mod burst;
mod progress;
mod report;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use clap::Args;

use crate::http;
use crate::receiver::{Delivery, Receiver, ReceiverOptions};
use crate::stack::{API_KEY, NOT_RUNNING, State, WEBHOOK_SECRET};
use crate::upstream::Audit;
use burst::Burst;
use progress::Progress;
use report::Report;

/// The settings of `devkit demo`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoArgs {
    /// Address of the API; without: that of the stack that `devkit up` started.
    #[arg(long, env = "API_URL")]
    api_url: Option<String>,
    /// The key to post with.
    #[arg(long, env = "API_KEY", default_value = API_KEY, hide_env_values = true)]
    api_key: String,
    /// The key's webhook secret.
    #[arg(long, env = "WEBHOOK_SECRET", default_value = WEBHOOK_SECRET, hide_env_values = true)]
    webhook_secret: String,
    /// Where the simulated upstream's audit is; without: that of the stack that `devkit up` started.
    #[arg(long, env = "UPSTREAM_AUDIT_URL")]
    upstream_audit_url: Option<String>,
    /// Where the demo's webhook receiver listens; port 0 is a free one.
    #[arg(long, env = "RECEIVER_LISTEN", default_value = "127.0.0.1:0")]
    receiver_listen: SocketAddr,
    /// The receiver's address as the worker sees it; without: where it listens.
    #[arg(long, env = "RECEIVER_PUBLIC_URL")]
    receiver_public_url: Option<String>,
    /// Messages to post, evenly over one window of the budget.
    #[arg(long, env = "DEMO_MESSAGES", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    messages: u16,
}

/// The addresses that the demo talks to.
struct Stack {
    api: String,
    audit: String,
}

/// Posts the burst, follows it to the end, and prints the table. The exit code is 1 if anything was lost, unverified or over the budget.
pub(crate) async fn run(args: DemoArgs) -> Result<ExitCode> {
    let stack = find(&args).await?;
    let client = http::client(Duration::from_secs(40))?;
    let before: Audit = http::document(&client, &stack.audit).await?;
    let window = Duration::from_millis(before.window_ms.max(1));
    let receiver = Receiver::start(args.receiver_listen, ReceiverOptions { secret: Some(args.webhook_secret.clone()) }).await?;
    let webhook_url = match &args.receiver_public_url {
        Some(url) => format!("{}/demo", url.trim_end_matches('/')),
        None => receiver.url("/demo"),
    };
    say!("{} messages over {window:.0?} to {}; the upstream allows {} calls in any {window:.0?}", args.messages, stack.api, before.limit);

    let total = usize::from(args.messages);
    // Every message costs a few calls, and an outage lasts up to five windows. Anything that takes longer than this will not arrive.
    let bound = window * (20 + u32::from(args.messages).div_ceil(u32::try_from(before.limit.max(1)).unwrap_or(u32::MAX)) * 4);
    let burst = Burst { client: client.clone(), api: stack.api.clone(), key: args.api_key.clone(), webhook_url, total, window, bound };
    let progress = Progress::start(total);
    let outcomes = burst.run(&progress, receiver.watch(), || verified_ids(&receiver.deliveries())).await;
    progress.finish();

    let audit = |since: u64| {
        let (client, url) = (client.clone(), with_since(&stack.audit, since));
        async move { http::document::<Audit>(&client, &url).await }
    };
    let during = audit(before.now_ms).await?;
    // A window that began before the demo counts too.
    let around = audit(before.now_ms.saturating_sub(before.window_ms)).await?;
    let report = Report::new(&outcomes, &receiver.deliveries(), &during, around.max_in_window);
    say!("{report}");
    Ok(if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn find(args: &DemoArgs) -> Result<Stack> {
    let state = State::load().ok().flatten().filter(State::runs);
    let choose = |given: &Option<String>, ours: fn(&State) -> String| {
        given.clone().filter(|url| !url.is_empty()).or_else(|| state.as_ref().map(ours)).ok_or_else(|| Error::msg(NOT_RUNNING))
    };
    let api = choose(&args.api_url, |state| state.api_url.clone())?.trim_end_matches('/').to_owned();
    let audit = choose(&args.upstream_audit_url, |state| state.upstream_url.clone())?;
    let audit = audit.trim_end_matches('/');
    let audit = if audit.ends_with("/_audit") { audit.to_owned() } else { format!("{audit}/_audit") };
    if !http::is_ready(&http::client(Duration::from_secs(5))?, &format!("{api}/health/ready")).await {
        return Err(anyhow!("{api} is not ready")).with_context(|| NOT_RUNNING);
    }
    Ok(Stack { api, audit })
}

fn with_since(audit: &str, since: u64) -> String {
    format!("{audit}?since={since}")
}

/// The IDs of the requests whose webhook was delivered and verified.
fn verified_ids(deliveries: &[Delivery]) -> std::collections::HashSet<String> {
    let verified = deliveries.iter().filter(|delivery| delivery.verified);
    verified.filter_map(|delivery| delivery.body["data"]["id"].as_str().map(str::to_owned)).collect()
}
