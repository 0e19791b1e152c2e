//! Making a failure short: steps are left out while it still fails.

use crate::{Failure, Trace, run_script, script::Script};

/// Scripts that are tried for one failure.
const TRIES_MAX: usize = 4000;

/// The shortest script found that still fails, and how.
pub fn shrink(script: &Script, failure: Failure) -> (Script, Failure) {
    shrink_by(script, failure, |script| run_script(script, Trace::Off).err())
}

/// The words of a failure without its names and numbers: a script that fails in another way has another failure.
fn kind(failure: &Failure) -> Vec<&str> {
    let words = failure.what.lines().next().unwrap_or_default().split_whitespace();
    words.filter(|word| word.len() > 1 && word.chars().all(|c| c.is_ascii_alphabetic() || c == ':')).collect()
}

/// The same for another way to run a script.
pub fn shrink_by(
    script: &Script,
    failure: Failure,
    fails: impl Fn(&Script) -> Option<Failure>,
) -> (Script, Failure) {
    let original = failure.clone();
    let kind = kind(&original);
    let fails = |script: &Script| fails(script).filter(|found| self::kind(found) == kind);
    let (mut best, mut found) = (script.clone(), failure);
    let mut alone = best.clone();
    alone.setup.operations = 0;
    if let Some(failure) = fails(&alone) {
        (best, found) = (alone, failure);
    }
    let mut tries = 0;
    let mut chunk = best.steps.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        let mut smaller = false;
        while at < best.steps.len() && tries < TRIES_MAX {
            tries += 1;
            let mut candidate = best.clone();
            candidate.steps.drain(at..(at + chunk).min(best.steps.len()));
            match fails(&candidate) {
                Some(failure) => {
                    (best, found) = (candidate, failure);
                    smaller = true;
                }
                None => at += chunk,
            }
        }
        if tries >= TRIES_MAX {
            break;
        }
        if chunk > 1 || !smaller {
            chunk /= 2;
        }
    }
    (best, found)
}
