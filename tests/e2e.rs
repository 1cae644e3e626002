//! A real LiveKit, real clients in its rooms, and this server beside it. Egress alone is the fake's: a worker of LiveKit's own is too large for a test.
//!
//! `tests/e2e/run` installs all that and sets `LIVE_MEETING_E2E`, the directory where it is; without it these tests say so and pass.

mod contract;
mod meetings;
mod real_livekit;

use crate::support::fake_livekit::{Audio, FakeLiveKit, OUR_NAME};
use crate::support::livekit_proxy::LiveKitProxy;
use crate::support::machine::say;
use crate::support::test_app::TestApp;
use real_livekit::{Installed, RealLiveKit};

/// What `tests/e2e/run` has installed; `None`, and a word about it, where it did not.
fn installed() -> Option<Installed> {
    let installed = Installed::find();
    if installed.is_none() {
        // A step of its own, in CI too.
        say("skipped: no real LiveKit, as LIVE_MEETING_E2E is not set (see tests/e2e/run)");
    }
    installed
}

/// A LiveKit and this server, which know each other through the proxy, and the fake that plays the egress.
struct Venue {
    app: TestApp,
    egress: FakeLiveKit,
    proxy: LiveKitProxy,
    livekit: RealLiveKit,
}

impl Venue {
    /// `env` is the server's, over what it needs.
    async fn open(installed: &Installed, env: &[(&str, &str)]) -> Self {
        let proxy = LiveKitProxy::start().await;
        let livekit = RealLiveKit::start(installed, &proxy.webhook_url()).await;
        let egress = FakeLiveKit::start().await;
        egress.tune(|knobs| knobs.elsewhere = Some(Audio::Counter));
        // All that this server hears is the real one's word.
        egress.lose_webhooks(true);
        let mut builder = TestApp::builder().env("LIVEKIT_URL", format!("ws://{}", proxy.addr)).env("EGRESS_WS_BASE", format!("ws://{OUR_NAME}"));
        for (name, value) in env {
            builder = builder.env(name, *value);
        }
        proxy.tell(|behind| {
            behind.livekit = Some(livekit.addr);
            behind.egress = Some(egress.addr());
        });
        let app = builder.start().await;
        egress.deliver_to(app.addr); // also how the worker finds it
        Self { app, egress, proxy, livekit }
    }

    /// From now on webhooks reach the server; before, they are refused.
    fn believe_webhooks(&self) {
        self.proxy.tell(|behind| behind.webhooks = Some(self.app.addr));
    }
}

impl Drop for Venue {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the server\n{}", self.app.log());
        }
    }
}
