//! What is done with images in a history, as steps of its script.
//!
//! They come in between the other steps, from numbers of their own: what a seed does with its volumes is the same without
//! them.

use bedplate_engine::exec::simulated::Seed;
use serde::{Deserialize, Serialize};

use crate::{
    faults::FaultKind,
    script::{Cut, Step, number_of},
};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// A new image arrives, or one that failed is asked for again.
    Arrive,
    Delete,
    /// What is kept of one that failed is cleared away.
    Clear,
}

/// How a source ends, at [`Manner::at`] unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Whole,
    Breaks,
    /// Nothing comes for too long.
    Stalls,
    /// The node is told to stop meanwhile.
    NodeStops,
    Cancelled,
    /// It says that this is all.
    Short,
    /// It goes on after its end.
    Long,
}

/// How a source delivers. Places are in 256ths of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manner {
    pub end: End,
    pub at: u8,
    /// Where a byte is wrong.
    pub wrong: Option<u8>,
    /// It has another file by now.
    pub changed: bool,
}

impl Manner {
    pub const SOUND: Manner = Manner { end: End::Whole, at: 0, wrong: None, changed: false };

    pub fn of(seed: &mut Seed) -> Manner {
        use End::*;
        const ENDS: [End; 12] =
            [Whole, Whole, Whole, Whole, Whole, Breaks, Breaks, Breaks, Stalls, NodeStops, Cancelled, Short];
        let end = if seed.one_in(24) { Long } else { ENDS[seed.index(ENDS.len())] };
        let wrong = seed.one_in(6).then(|| number_of(seed.below(256)));
        Manner { end, at: number_of(seed.below(256)), wrong, changed: seed.one_in(8) }
    }
}

/// A step that is about an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStep {
    pub act: Act,
    /// Which of those that it can be done with.
    pub image: u8,
    pub manner: Manner,
}

/// The same steps with images in between. `fault` is what goes wrong in this seed.
pub fn with_images(steps: Vec<Step>, number: u64, fault: impl Fn(&mut Seed) -> FaultKind) -> Vec<Step> {
    let mut seed = Seed(!number);
    let often = [20, 60, 120, 240][seed.index(4)];
    let mut all = Vec::with_capacity(steps.len() + 32);
    for step in steps {
        if seed.one_in(often) {
            // What can go wrong goes wrong in the middle of it.
            if seed.one_in(3) {
                let most = [2, 8, 30][seed.index(3)];
                all.push(Step::Fault { fault: fault(&mut seed), after: number_of(seed.below(most)) });
            }
            if seed.one_in(10) {
                let cut = if seed.one_in(3) { Cut::Kill } else { Cut::Power };
                let most = [20, 100, 300][seed.index(3)];
                all.push(Step::Cut { cut, after: number_of(seed.below(most)) });
            }
            let act =
                [Act::Arrive, Act::Arrive, Act::Arrive, Act::Arrive, Act::Delete, Act::Delete, Act::Clear]
                    [seed.index(7)];
            let (image, manner) = (number_of(seed.below(256)), Manner::of(&mut seed));
            all.push(Step::Image(ImageStep { act, image, manner }));
        }
        all.push(step);
    }
    all
}
