/// Works on items concurrently, and hands over the results in the order of the items.
///
/// - Parameters:
///   - width: largest number of items in work or waiting to be handed over; evaluated repeatedly.
///   - work: runs in child tasks.
///   - use: runs in the caller's task, for one result at a time.
/// - Throws: the first error of `work` or `use`; the other tasks are then cancelled.
package func inOrder<Item: Sendable, Product: Sendable>(
    _ items: some Sequence<Item>, width: @autoclosure () -> Int,
    work: @escaping @Sendable (Item) async throws -> Product,
    use: (Product) async throws -> Void
) async throws {
    try await withThrowingTaskGroup(of: (Int, Product).self) { group in
        var iterator = items.makeIterator()
        var started = 0
        var used = 0
        var waiting: [Int: Product] = [:]
        func start() -> Bool {
            guard let item = iterator.next() else { return false }
            let number = started
            started += 1
            group.addTask { (number, try await work(item)) }
            return true
        }
        func fill() { while started - used < width(), start() {} }
        fill()
        while used < started {
            while let product = waiting.removeValue(forKey: used) {
                used += 1
                fill()
                try await use(product)
            }
            guard used < started, let (number, product) = try await group.next() else { continue }
            waiting[number] = product
        }
    }
}
