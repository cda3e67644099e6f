import Foundation

/// Some of the cases of a test whose cases are many and much alike, evenly spread from the first
/// on. `SWIMG_ALL_CASES` in the environment asks for all of them.
public func some<Case>(_ count: Int, of all: [Case]) -> [Case] {
    guard count < all.count, ProcessInfo.processInfo.environment["SWIMG_ALL_CASES"] == nil else {
        return all
    }
    return (0..<count).map { all[$0 * all.count / count] }
}

/// A third of the pairs of two kinds of cases, or half of them if there are only two of a kind, so
/// that each case of either kind occurs. `SWIMG_ALL_CASES` asks for all pairs.
public func some<First, Second>(
    of first: some Collection<First>, with second: some Collection<Second>
) -> [(First, Second)] {
    let isWhole = ProcessInfo.processInfo.environment["SWIMG_ALL_CASES"] != nil
    let step = isWhole ? 1 : min(3, first.count, second.count)
    return first.enumerated().flatMap { row, one in
        second.enumerated().filter { column, _ in (row + column).isMultiple(of: step) }
            .map { (one, $0.element) }
    }
}
