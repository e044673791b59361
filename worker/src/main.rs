//! `worker`: see the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    shared::process::run(async { worker::run::until_stopped(shared::settings::parse()).await })
}
