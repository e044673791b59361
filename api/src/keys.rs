//! `api keys …`: the commands that manage API keys.

use shared::process::ProcessError;
use shared::standard_webhooks::WebhookSecret;
use shared::store::Store;
use shared::store::keys::{ApiKey, BOOTSTRAP, Changed, Created};

use crate::settings::{KeysCommand, Settings};

/// Runs one command and prints its result.
///
/// # Errors
/// One line: what went wrong, and how to fix it.
pub async fn run(settings: &Settings, command: KeysCommand) -> Result<(), ProcessError> {
    let store = Store::connect_lazily(&settings.database)?;
    // Who only looks must not change the schema under processes that run with the older one.
    let may_migrate = matches!(command, KeysCommand::Create { .. }) && settings.database.migrate_on_start;
    store.prepare(may_migrate).await?;
    match command {
        KeysCommand::Create { name, scopes, expires_in } => {
            if !(1..=64).contains(&name.chars().count()) || name.contains(char::is_control) {
                return Err(ProcessError::Command(format!(
                    "--name {name:?}: accepted: 1 to 64 characters, none of them a control character"
                )));
            }
            if name == BOOTSTRAP {
                return Err(ProcessError::Command(format!("--name {name}: the name of the key of BOOTSTRAP_API_KEY; choose another")));
            }
            let (key, secret) = (ApiKey::generate(), WebhookSecret::generate());
            match store.create_key(&name, &key, &scopes, &secret, expires_in).await? {
                Created::Created => println!("key:            {}\nwebhook secret: {}", key.expose(), secret.expose_text()),
                Created::NameTaken => {
                    return Err(ProcessError::Command(format!("--name {name}: a live key has this name; revoke it or choose another")));
                }
            }
            eprintln!("Keep both: they are not shown again.");
        }
        KeysCommand::List => {
            println!("{:<24} {:<12} {:<21} {:<21} STATE", "NAME", "SCOPES", "CREATED", "EXPIRES");
            for key in store.list_keys().await? {
                let day = |time: time::OffsetDateTime| format!("{} {:02}:{:02}Z", time.date(), time.hour(), time.minute());
                let revoked_first = key.revoked_at.is_some_and(|at| key.expires_at.is_none_or(|expires| at < expires));
                let state = if revoked_first {
                    "revoked"
                } else if key.is_expired {
                    "expired"
                } else {
                    "live"
                };
                let expires = key.expires_at.map_or_else(|| "never".to_owned(), day);
                println!("{:<24} {:<12} {:<21} {:<21} {state}", key.name, key.scopes.join(","), day(key.created_at), expires);
            }
        }
        KeysCommand::RotateWebhookSecret { key, grace } => {
            let (name, secret) = (key.get(), WebhookSecret::generate());
            if store.rotate_webhook_secret(name, &secret, grace).await? == Changed::NoSuchKey {
                return Err(no_such_key(name));
            }
            println!("webhook secret: {}", secret.expose_text());
            if grace.is_zero() {
                eprintln!("Keep it: it is not shown again. Webhooks are signed with it only, from now on.");
            } else {
                let grace = humantime::format_duration(grace);
                eprintln!("Keep it: it is not shown again. For {grace}, webhooks are signed with the old one too.");
            }
            if name == BOOTSTRAP {
                eprintln!("Where BOOTSTRAP_WEBHOOK_SECRET is set, change it too: it is put back when `api` starts.");
            }
        }
        KeysCommand::Reencrypt => {
            let done = store.reencrypt().await?;
            println!("encrypted again: {} webhook secrets", done.secrets);
            for (key, requests) in done.needed {
                println!("still needed: {key}, by the headers of {requests} requests, until their retention is over");
            }
        }
        KeysCommand::Revoke(key) => {
            let name = key.get();
            if store.revoke_key(name).await? == Changed::NoSuchKey {
                return Err(no_such_key(name));
            }
            println!("revoked {name}");
        }
    }
    Ok(())
}

fn no_such_key(name: &str) -> ProcessError {
    ProcessError::Command(format!("{name}: no live key has this name; `api keys list` shows them"))
}
