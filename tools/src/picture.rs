//! A picture of where data lies: a volume divided into cells of the same size.
//!
//! Owns [`Picture`], which counts for each cell what it is made of, and its drawing with characters. The drawing for
//! pages is `html.rs`'s.

use std::fmt::Write;

use crate::stack::{Kind, Run};

/// Cells of one line.
pub const COLUMNS: usize = 64;
/// Lines of a picture.
const LINES: u64 = 16;
/// Cells are whole blocks.
const CELL_LEN_MIN: u64 = 4096;

/// What a cell is made of, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    pub len: u64,
    pub data: u64,
    pub compressed: u64,
    pub zero: u64,
    pub unopened: u64,
    pub damaged: u64,
    /// The layer that has most of it, of those that have anything, and how much.
    pub layer: Option<(usize, u64)>,
}

/// What a cell looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Damaged,
    Unopened,
    /// So many eighths of it are data, at least one.
    Data {
        eighths: u64,
        is_compressed: bool,
    },
    Zero,
    Absent,
}

/// All cells, in order.
pub struct Picture {
    pub cell_len: u64,
    pub cells: Vec<Cell>,
}

impl Picture {
    /// `runs` cover `size` bytes from `start` on.
    pub fn new(runs: &[Run], start: u64, size: u64) -> Picture {
        let columns = COLUMNS as u64;
        let cell_len = size.div_ceil(columns * LINES).next_multiple_of(CELL_LEN_MIN);
        let mut cells = Vec::new();
        let mut left = size;
        while left > 0 {
            cells.push(Cell { len: left.min(cell_len), ..Cell::default() });
            left -= left.min(cell_len);
        }
        for run in runs {
            let mut at = run.range.start.0 - start;
            let end = at + run.range.len.0;
            while at < end {
                let index = at / cell_len;
                let next = end.min((index + 1) * cell_len);
                let cell = usize::try_from(index).ok().and_then(|index| cells.get_mut(index));
                if let Some(cell) = cell {
                    cell.add(run.kind, run.depth, next - at);
                }
                at = next;
            }
        }
        Picture { cell_len, cells }
    }

    /// With characters: how full each cell is, or which layer has most of it.
    pub fn chart(&self, start: u64, by: By) -> String {
        let mut text = String::new();
        let mut at = start;
        for line in self.cells.chunks(COLUMNS) {
            // Writing to a string does not fail.
            let _ = write!(text, "{at:#018x} ");
            text.extend(line.iter().map(|cell| cell.character(by)));
            text.push('\n');
            at += line.iter().map(|cell| cell.len).sum::<u64>();
        }
        let legend = match by {
            By::Fullness => "░▒▓█ data, from some to all of the cell; c compressed",
            By::Layer => "0-9 a-z the layer that has most of it, 0 on top; + deeper",
        };
        let _ = write!(
            text,
            "one cell is {}; {legend}; - zeros; . nothing; ? not opened; ! damaged",
            crate::size::show(self.cell_len)
        );
        text
    }
}

/// What a chart shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Fullness,
    Layer,
}

impl Cell {
    fn add(&mut self, kind: Kind, depth: usize, len: u64) {
        let counter = match kind {
            Kind::Data { .. } => &mut self.data,
            Kind::Compressed => &mut self.compressed,
            Kind::Zero { .. } => &mut self.zero,
            Kind::Unopened => &mut self.unopened,
            Kind::Damaged => &mut self.damaged,
            Kind::Absent => return,
        };
        *counter += len;
        self.layer = match self.layer {
            Some((same, held)) if same == depth => Some((depth, held + len)),
            Some((other, held)) if held >= len => Some((other, held)),
            Some(_) | None => Some((depth, len)),
        };
    }

    pub fn look(&self) -> Look {
        let data = self.data + self.compressed;
        if self.damaged > 0 {
            Look::Damaged
        } else if self.unopened > 0 {
            Look::Unopened
        } else if data > 0 {
            let eighths = u128::from(data) * 8 / u128::from(self.len.max(1));
            let eighths = u64::try_from(eighths).unwrap_or(8).clamp(1, 8);
            Look::Data { eighths, is_compressed: self.compressed > self.data }
        } else if self.zero > 0 {
            Look::Zero
        } else {
            Look::Absent
        }
    }

    fn character(&self, by: By) -> char {
        match (self.look(), by, self.layer) {
            (Look::Damaged, ..) => '!',
            (Look::Unopened, ..) => '?',
            (Look::Absent, ..) | (_, By::Layer, None) => '.',
            (Look::Data { .. } | Look::Zero, By::Layer, Some((depth, _))) => {
                u32::try_from(depth).ok().and_then(|depth| char::from_digit(depth, 36)).unwrap_or('+')
            }
            (Look::Zero, By::Fullness, _) => '-',
            (Look::Data { is_compressed: true, .. }, By::Fullness, _) => 'c',
            (Look::Data { eighths, .. }, By::Fullness, _) => match eighths {
                0..=2 => '░',
                3..=5 => '▒',
                6..=7 => '▓',
                _ => '█',
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use bedplate_engine::units::ByteRange;

    use super::*;

    #[test]
    fn cells_show_what_they_are_made_of_and_whose_it_is() {
        let run = |start, len, depth, kind| Run { range: ByteRange::new(start, len), depth, kind };
        let runs = [
            run(0, 4096, 0, Kind::Data { offset: 0 }),
            run(4096, 512, 1, Kind::Data { offset: 0 }),
            run(4608, 7680, 0, Kind::Absent),
            run(12288, 4096, 2, Kind::Zero { offset: None }),
            run(16384, 4096, 0, Kind::Compressed),
            run(20480, 1, 0, Kind::Damaged),
        ];
        let picture = Picture::new(&runs, 0, 20481);
        let line = |by| picture.chart(0, by).lines().next().map(str::to_owned).unwrap();
        assert_eq!(line(By::Fullness), "0x0000000000000000 █░.-c!");
        assert_eq!(line(By::Layer), "0x0000000000000000 01.20!");
        assert_eq!(picture.cells.iter().map(|cell| cell.len).sum::<u64>(), 20481);
    }

    #[test]
    fn pictures_of_nothing_and_of_everything_are_small() {
        assert!(Picture::new(&[], 0, 0).cells.is_empty());
        let most = bedplate_engine::units::VOLUME_SIZE_MAX;
        assert_eq!(Picture::new(&[], 0, most).cells.len(), 1024);
    }
}
