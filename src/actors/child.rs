//! Supervision that works: a child is rebuilt from a factory, its panic is seen, and its restarts have a budget.
//!
//! actix's own `Supervisor` reuses the dying instance, restarts without delay or limit, and does not see panics (`docs/FACTS.md`, F3).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use actix::{Actor, Addr, AsyncContext, Context};
use tokio::task::JoinHandle;

/// How often a child may be restarted.
#[derive(Debug, Clone, Copy)]
pub struct RestartPolicy {
    /// Restarts within `window`; one more gives up.
    pub intensity: usize,
    pub window: Duration,
    /// Wait before the first restart, doubled for each in the window; zero restarts at once.
    pub first_backoff: Duration,
    pub max_backoff: Duration,
}

/// What to do about a dead child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    RestartIn(Duration),
    GiveUp,
}

/// The restarts of one child that its policy still remembers.
#[derive(Debug)]
pub struct RestartBudget {
    policy: RestartPolicy,
    restarts: VecDeque<Instant>,
}

impl RestartBudget {
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, restarts: VecDeque::new() }
    }

    pub fn on_failure(&mut self, now: Instant, jitter: f64) -> Verdict {
        while self.restarts.front().is_some_and(|then| now.saturating_duration_since(*then) > self.policy.window) {
            self.restarts.pop_front();
        }
        if self.restarts.len() >= self.policy.intensity {
            return Verdict::GiveUp;
        }
        let attempt = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        self.restarts.push_back(now);
        Verdict::RestartIn(backoff(attempt, self.policy.first_backoff, self.policy.max_backoff, jitter))
    }
}

/// `first × 2^attempt`, at most `cap`, of which `jitter` (0 to 1) takes away up to a half: many that fail together do not return together.
pub fn backoff(attempt: u32, first: Duration, cap: Duration, jitter: f64) -> Duration {
    let full = first.saturating_mul(2u32.saturating_pow(attempt.min(31))).min(cap);
    full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0)
}

/// A random wait of nothing up to `first × 2^attempt`, at most `cap`: `jitter` (0 to 1) says how much of it. For many who fail together at what one serves.
pub fn full_jitter(attempt: u32, first: Duration, cap: Duration, jitter: f64) -> Duration {
    first.saturating_mul(2u32.saturating_pow(attempt.min(31))).min(cap).mul_f64(jitter.clamp(0.0, 1.0))
}

/// A random number from 0 to 1; the middle where the machine has no randomness.
pub fn jitter() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}

/// A child actor and the means to make it again.
pub struct Child<A: Actor<Context = Context<A>>> {
    factory: Box<dyn FnMut() -> A>,
    addr: Addr<A>,
    generation: u32,
    pub budget: RestartBudget,
}

impl<A: Actor<Context = Context<A>>> Child<A> {
    /// Starts the first generation. The handle resolves when it ends: `Err` for a panic.
    pub fn start(policy: RestartPolicy, mut factory: impl FnMut() -> A + 'static) -> (Self, JoinHandle<()>) {
        let (addr, running) = run(factory());
        (Self { factory: Box::new(factory), addr, generation: 0, budget: RestartBudget::new(policy) }, running)
    }

    /// Starts the next generation in the place of this one.
    pub fn restart(&mut self) -> JoinHandle<()> {
        let (addr, running) = run((self.factory)());
        self.addr = addr;
        self.generation += 1;
        running
    }

    pub fn addr(&self) -> &Addr<A> {
        &self.addr
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }
}

fn run<A: Actor<Context = Context<A>>>(actor: A) -> (Addr<A>, JoinHandle<()>) {
    let context = Context::new();
    let addr = context.address();
    (addr, actix_rt::spawn(context.into_future(actor)))
}

#[cfg(test)]
mod tests {
    use actix::{Handler, Message};

    use super::*;

    const POLICY: RestartPolicy = RestartPolicy {
        intensity: 3,
        window: Duration::from_secs(60),
        first_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_millis(300),
    };

    #[test]
    fn the_budget_is_spent_and_comes_back() {
        let mut budget = RestartBudget::new(POLICY);
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        let ms = |ms| Verdict::RestartIn(Duration::from_millis(ms));
        let verdicts: Vec<Verdict> = [0, 1, 2, 3, 61].map(|second| budget.on_failure(at(second), 0.0)).into();
        assert_eq!(verdicts, [ms(100), ms(200), ms(300), Verdict::GiveUp, ms(300)]);
    }

    #[test]
    fn backoff_doubles_to_its_cap_and_jitter_takes_at_most_half() {
        let second = Duration::from_secs(1);
        let cap = Duration::from_secs(30);
        let waits: Vec<u64> = (0..7).map(|attempt| backoff(attempt, second, cap, 0.0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(backoff(4_000_000_000, second, cap, 1.0), cap / 2);
        assert_eq!(backoff(3, Duration::ZERO, cap, 0.3), Duration::ZERO);
    }

    struct Fragile(u32);

    impl Actor for Fragile {
        type Context = Context<Self>;
    }

    #[derive(Message)]
    #[rtype(result = "u32")]
    struct GetNumber;

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Break;

    impl Handler<GetNumber> for Fragile {
        type Result = u32;

        fn handle(&mut self, _: GetNumber, _: &mut Context<Self>) -> u32 {
            self.0
        }
    }

    impl Handler<Break> for Fragile {
        type Result = ();

        fn handle(&mut self, _: Break, _: &mut Context<Self>) {
            panic!("as asked");
        }
    }

    #[actix_rt::test]
    async fn a_panic_is_seen_and_the_next_generation_is_a_new_actor() {
        let mut made = 0;
        let (mut child, running) = Child::start(POLICY, move || {
            made += 1;
            Fragile(made)
        });
        child.addr().send(Break).await.expect_err("it dies of it");
        assert!(running.await.expect_err("a panic").is_panic());
        let running = child.restart();
        assert_eq!(child.addr().send(GetNumber).await.expect("alive"), 2);
        assert_eq!(child.generation(), 1);
        assert!(!running.is_finished());
    }
}
