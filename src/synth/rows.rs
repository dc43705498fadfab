//! Rows: the events as text, in the columns and the order of the real file.

use std::io::{self, Write};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::session::PRICE;
use super::shop::Shop;

/// The header of the events file.
pub(super) const HEADER: &str =
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n";

const DAY_SECONDS: u64 = 86_400;
/// How the rows of a day are spread over its hours.
const HOUR_SHARES: [u64; 24] =
    [3, 3, 6, 12, 19, 25, 29, 31, 32, 32, 31, 30, 30, 31, 33, 36, 38, 37, 33, 26, 17, 10, 6, 4];

const FIRST_PRODUCT_ID: u64 = 1_000_000;
const FIRST_CATEGORY_ID: u64 = 2_053_013_550_000_000_000;
const CATEGORY_ID_STEP: u64 = 97_654_321;
const FIRST_USER_ID: u64 = 512_000_000;

/// One category of so many has no code.
const UNCODED_CATEGORY_ONE_IN: u32 = 3;
/// Products of a brand, on average.
const BRAND_ITEMS: u32 = 30;
/// Of a hundred products, how many have no brand.
const UNBRANDED_PERCENT: u32 = 14;

const CATEGORY_CODES: [&str; 32] = [
    "electronics.smartphone",
    "electronics.tablet",
    "electronics.clocks",
    "electronics.audio.headphone",
    "electronics.audio.speaker",
    "electronics.video.tv",
    "electronics.camera",
    "computers.notebook",
    "computers.desktop",
    "computers.monitor",
    "computers.printer",
    "computers.keyboard",
    "appliances.kitchen.kettle",
    "appliances.kitchen.oven",
    "appliances.kitchen.fridge",
    "appliances.kitchen.dishwasher",
    "appliances.washer",
    "appliances.vacuum",
    "appliances.iron",
    "apparel.shoes",
    "apparel.shirt",
    "apparel.jacket",
    "furniture.bedroom.bed",
    "furniture.living_room.sofa",
    "furniture.kitchen.table",
    "auto.tyres",
    "auto.player",
    "kids.carriage",
    "kids.toys",
    "sport.bicycle",
    "sport.treadmill",
    "construction.drill",
];

const SYLLABLES: [&str; 16] =
    ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "xu", "za"];

/// What the rows of an item say about it: product, category and brand columns and the price, ready to be
/// written.
pub(super) struct Labels {
    text: Vec<u8>,
    /// Where each item's text begins, and the last one's ends.
    begins: Vec<usize>,
}

impl Labels {
    /// Draws prices and the items without a brand.
    pub(super) fn draw(shop: &Shop, rng: &mut ChaCha8Rng) -> io::Result<Self> {
        let mut text = Vec::new();
        let mut begins = vec![0];
        let n_brands = shop.n_items().div_ceil(BRAND_ITEMS);
        for item in 0..shop.n_items() {
            let category = shop.category(item);
            let category_id = FIRST_CATEGORY_ID + u64::from(category) * CATEGORY_ID_STEP;
            write!(text, "{},{category_id},", FIRST_PRODUCT_ID + u64::from(item))?;
            if !category.is_multiple_of(UNCODED_CATEGORY_ONE_IN) {
                text.extend_from_slice(CATEGORY_CODES[category as usize % CATEGORY_CODES.len()].as_bytes());
            }
            text.push(b',');
            if rng.random_range(0..100u32) >= UNBRANDED_PERCENT {
                push_brand(rng.random_range(0..n_brands), &mut text);
            }
            let price = PRICE.draw(rng);
            write!(text, ",{}.{:02}", price / 100, price % 100)?;
            begins.push(text.len());
        }
        Ok(Self { text, begins })
    }

    fn of(&self, item: u32) -> &[u8] {
        &self.text[self.begins[item as usize]..self.begins[item as usize + 1]]
    }
}

/// A name of three syllables or more, different for each brand.
fn push_brand(brand: u32, text: &mut Vec<u8>) {
    let base = SYLLABLES.len() as u64;
    let mut number = u64::from(brand) + base * base;
    while number > 0 {
        text.extend_from_slice(SYLLABLES[(number % base) as usize].as_bytes());
        number /= base;
    }
}

/// What a visitor does in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    View,
    Cart,
    Purchase,
}

impl Kind {
    /// What a row does that stays with the item of the row before.
    pub(super) fn after(self, rng: &mut ChaCha8Rng) -> Self {
        match (self, rng.random_range(0..100u32)) {
            (Self::Cart, 0..45) | (Self::View, 0..4) => Self::Purchase,
            (Self::View, 4..13) => Self::Cart,
            _ => Self::View,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Cart => "cart",
            Self::Purchase => "purchase",
        }
    }
}

/// Who acts in the rows of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visitor {
    user: u32,
    /// Random bits of the session's id; nothing where the shop lost it.
    session: Option<u128>,
}

impl Visitor {
    pub(super) fn draw(n_users: u32, has_session: bool, rng: &mut ChaCha8Rng) -> Self {
        Self { user: rng.random_range(0..n_users), session: has_session.then(|| rng.random()) }
    }
}

/// Writes rows in order of time.
pub(super) struct Rows<'a> {
    out: &'a mut dyn Write,
    labels: Labels,
    line: Vec<u8>,
    /// The second that `time` says, since the first midnight.
    second: u64,
    /// The present second as the file writes it.
    time: Vec<u8>,
    date: Date,
    /// The day of `date`, counted from 0.
    day: u64,
}

impl<'a> Rows<'a> {
    /// Writes the header.
    pub(super) fn begin(labels: Labels, out: &'a mut dyn Write) -> io::Result<Self> {
        out.write_all(HEADER.as_bytes())?;
        let date = Date { year: 2019, month: 10, day: 1 };
        let mut rows = Self { out, labels, line: Vec::new(), second: 0, time: Vec::new(), date, day: 0 };
        rows.spell_time()?;
        Ok(rows)
    }

    /// Writes one row; `second` counts from the first midnight and never goes back.
    pub(super) fn write(&mut self, second: u64, kind: Kind, item: u32, visitor: &Visitor) -> io::Result<()> {
        if second != self.second {
            self.second = second;
            self.spell_time()?;
        }
        self.line.clear();
        self.line.extend_from_slice(&self.time);
        self.line.push(b',');
        self.line.extend_from_slice(kind.name().as_bytes());
        self.line.push(b',');
        self.line.extend_from_slice(self.labels.of(item));
        write!(self.line, ",{},", FIRST_USER_ID + u64::from(visitor.user))?;
        if let Some(session) = visitor.session {
            push_uuid(session, &mut self.line);
        }
        self.line.push(b'\n');
        self.out.write_all(&self.line)
    }

    fn spell_time(&mut self) -> io::Result<()> {
        while self.day < self.second / DAY_SECONDS {
            self.date = self.date.next();
            self.day += 1;
        }
        let Date { year, month, day } = self.date;
        let (hour, minute, second) = (self.second / 3600 % 24, self.second / 60 % 60, self.second % 60);
        self.time.clear();
        write!(self.time, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// The bits as a random (version 4) UUID.
fn push_uuid(bits: u128, line: &mut Vec<u8>) {
    const VERSION: u128 = 0xf << 76;
    const VARIANT: u128 = 0b11 << 62;
    let uuid = (bits & !VERSION & !VARIANT) | 4 << 76 | 0b10 << 62;
    for (at, byte) in uuid.to_be_bytes().into_iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            line.push(b'-');
        }
        for digit in [byte >> 4, byte & 15] {
            line.push(b"0123456789abcdef"[usize::from(digit)]);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: u32,
    month: u32,
    day: u32,
}

impl Date {
    /// The day after, in the Gregorian calendar.
    fn next(self) -> Self {
        let Self { year, month, day } = self;
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let length = match month {
            2 => 28 + u32::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        match (month, day) {
            (12, 31) => Self { year: year + 1, month: 1, day: 1 },
            (_, day) if day == length => Self { year, month: month + 1, day: 1 },
            _ => Self { day: day + 1, ..self },
        }
    }
}

/// When the session begins before which `row` of `n_rows` rows have begun, in seconds since the first
/// midnight: the rows are spread evenly over `n_days` days, and by the hour's share over each day.
pub(super) fn begin_second(row: u64, n_rows: u64, n_days: u32) -> u64 {
    let day_shares: u64 = HOUR_SHARES.iter().sum::<u64>() * 3600;
    let passed = u128::from(row) * u128::from(day_shares) * u128::from(n_days) / u128::from(n_rows);
    let (day, mut left) =
        ((passed / u128::from(day_shares)) as u64, (passed % u128::from(day_shares)) as u64);
    let mut hour = 0;
    while left >= HOUR_SHARES[hour] * 3600 {
        left -= HOUR_SHARES[hour] * 3600;
        hour += 1;
    }
    day * DAY_SECONDS + hour as u64 * 3600 + left / HOUR_SHARES[hour]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_knows_leap_years() {
        let next = |year, month, day| {
            let Date { year, month, day } = Date { year, month, day }.next();
            (year, month, day)
        };
        assert_eq!(next(2019, 10, 31), (2019, 11, 1));
        assert_eq!(next(2019, 12, 31), (2020, 1, 1));
        assert_eq!(next(2020, 2, 28), (2020, 2, 29));
        assert_eq!(next(2100, 2, 28), (2100, 3, 1));
        assert_eq!(next(2020, 4, 30), (2020, 5, 1));
    }

    #[test]
    fn sessions_begin_from_the_first_midnight_to_before_the_last() {
        assert_eq!(begin_second(0, 1000, 3), 0);
        let seconds: Vec<u64> = (0..1000).map(|row| begin_second(row, 1000, 3)).collect();
        assert!(seconds.is_sorted());
        assert!(seconds[999] < 3 * DAY_SECONDS);
        assert_eq!(seconds.iter().filter(|&&second| second / DAY_SECONDS == 1).count(), 333);
    }

    #[test]
    fn ids_and_names_are_well_formed_and_differ() {
        let mut line = Vec::new();
        push_uuid(u128::MAX, &mut line);
        assert_eq!(String::from_utf8(line).unwrap(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let names: std::collections::BTreeSet<Vec<u8>> = (0..5000)
            .map(|brand| {
                let mut name = Vec::new();
                push_brand(brand, &mut name);
                name
            })
            .collect();
        assert_eq!(names.len(), 5000);
    }
}
