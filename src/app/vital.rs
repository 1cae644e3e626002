//! What nothing can go on without: its panic and its silence end the process. Every file is valid then, and a restart closes the rows.

use actix::{Actor, Addr, AsyncContext, Context};
use tokio::task::JoinHandle;

use crate::actors::session_registry::{Ping, SessionRegistry};
use crate::watchdog::{EXIT_CODE, Watchdog};

/// Starts an actor whose panic ends the process.
pub fn launch_vital<A: Actor<Context = Context<A>>>(name: &'static str, actor: A) -> Addr<A> {
    let context = Context::new();
    let addr = context.address();
    end_with_its_panic(name, actix_rt::spawn(context.into_future(actor)));
    addr
}

pub fn end_with_its_panic<T: 'static>(name: &'static str, running: JoinHandle<T>) {
    actix_rt::spawn(async move {
        if let Err(error) = running.await
            && error.is_panic()
        {
            log::error!("the {name} panicked, the server ends error={error}");
            std::process::exit(EXIT_CODE);
        }
    });
}

/// The registry may wait for ever though its thread does not.
pub fn watch(watchdog: &Watchdog, registry: &Addr<SessionRegistry>) {
    let registry = registry.clone();
    watchdog.watch_answers("the registry", move || {
        let answer = registry.send(Ping);
        async move { answer.await.is_ok() }
    });
}
